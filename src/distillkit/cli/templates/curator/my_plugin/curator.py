"""A curator that alternates between the teacher's and the student's responses."""

from collections.abc import Mapping, Sequence

from distillkit import Sampling
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompt, Prompts, Response, Row


class MyPlugin(Curator):
    """Uses the teacher's responses in even rounds and the student's in odd rounds; a round is an epoch.

    Args:
        sampling: Settings for generating responses; None is temperature 0.8 and top-p 0.95.
    """

    def __init__(self, sampling: Sampling | None = None) -> None:
        super().__init__()
        self.sampling = sampling or Sampling()

    @property
    def rounds(self) -> str:
        """Generates new responses once per epoch."""
        return "epoch"

    @property
    def writers(self) -> frozenset[str]:
        """The models whose responses it uses: teacher and student."""
        return frozenset({"teacher", "student"})

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """Returns one row per prompt, all with responses of this round's writer."""
        writer = ("teacher", "student")[prompts.round % 2]
        responses = generators[writer].generate(prompts, self.sampling)
        return [self._row(prompt, response, writer) for prompt, response in zip(prompts, responses, strict=True)]

    def _row(self, prompt: Prompt, response: Response, writer: str) -> Row:
        """A training row: the prompt followed by its response, with the loss on the response only."""
        mask = (False,) * len(prompt.input_ids) + (True,) * len(response.token_ids)
        ended, blank = response.finish == "stop", not response.text.strip()
        tokens = prompt.input_ids + response.token_ids
        return Row(tokens, mask, writer, prompt.id, ended, blank, response.pending)

"""Who writes the responses."""

from collections.abc import Mapping, Sequence

from distillkit import Sampling
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompt, Prompts, Response, Row


class MyPlugin(Curator):
    """The teacher's responses in rounds 0, 2, 4, …, the student's in those between; a round is an epoch.

    Args:
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95.
    """

    def __init__(self, sampling: Sampling | None = None) -> None:
        super().__init__()
        self.sampling = sampling or Sampling()

    @property
    def rounds(self) -> str:
        """`epoch`."""
        return "epoch"

    @property
    def writers(self) -> frozenset[str]:
        """Teacher and student."""
        return frozenset({"teacher", "student"})

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt, all by the writer whose round it is."""
        writer = ("teacher", "student")[prompts.round % 2]
        responses = generators[writer].generate(prompts, self.sampling)
        return [self._row(prompt, response, writer) for prompt, response in zip(prompts, responses, strict=True)]

    def _row(self, prompt: Prompt, response: Response, writer: str) -> Row:
        """A prompt with its response, which is what is trained on."""
        mask = (False,) * len(prompt.input_ids) + (True,) * len(response.token_ids)
        ended, blank = response.finish == "stop", not response.text.strip()
        return Row(prompt.input_ids + response.token_ids, mask, writer, prompt.id, ended, blank)

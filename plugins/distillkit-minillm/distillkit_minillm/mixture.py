"""Responses drawn from a mixture of teacher and student, token by token."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillkit.curators.rounds import Rounds
from distillkit.curators.single import SampledCurator
from distillkit.errors import ConfigError
from distillkit.generators.drafting import Reader
from distillkit.generators.sampling import draw_from, processed
from distillkit.interfaces import Generator
from distillkit.losses.token import checked_share
from distillkit.models.scoring import base_model, evaluating
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompts, Response, Sampling


class MixtureGenerator(Generator):
    """Each token is drawn from α·p + (1−α)·q, the teacher's and the student's distribution as `sampling` has them.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 5.

    Args:
        teacher_share: α in [0, 1).
        batch_size: Prompts continued at once, at least 1.

    Raises:
        ConfigError: If a number is out of range.
    """

    models = ("student", "teacher")

    def __init__(self, teacher_share: float = 0.2, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ConfigError(f"MixtureGenerator.batch_size must be at least 1, got {batch_size}.")
        self.share, self.batch_size = checked_share("MixtureGenerator.teacher_share", teacher_share), batch_size
        self._models: Any = None

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the weights that both models have now, without copying them."""
        self._models, self._tokenizer = model, tokenizer
        self._ends = frozenset(eos_ids(tokenizer, base_model(self._models["teacher"])))

    def identity(self) -> str:
        """The mixture."""
        return f"mixture teacher_share={self.share}"

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].input_ids))
        found: dict[int, Response] = {}
        with evaluating(self._models):
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                asked = Prompts(tuple(prompts[place] for place in places), prompts.round)
                found |= dict(zip(places, self._write(asked, sampling), strict=True))
        return [found[place] for place in range(len(prompts))]

    def _write(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """A batch's responses; rows that end leave it."""
        device = base_model(self._models["student"]).device
        vocab, longest = len(self._tokenizer), sampling.max_new_tokens
        student, teacher = (Reader(self._models[name], vocab, lag=0) for name in ("student", "teacher"))
        width = max(len(prompt.input_ids) for prompt in prompts)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        ids = torch.tensor([[0] * (width - len(own.input_ids)) + list(own.input_ids) for own in prompts]).to(device)
        mask = (torch.arange(width) >= width - lengths[:, None]).long().to(device)  # [R, W]
        uniform = torch.stack([_uniform(sampling.seed_of(prompts.round, own.id), longest) for own in prompts]).to(
            device
        )
        written: list[list[tuple[int, float]]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for step in range(longest):
            logits = [reader.read(ids, mask, 1)[:, 0].to(device) for reader in (teacher, student)]
            drawn_by = self._mixed(*(processed(own, sampling) for own in logits))
            tokens = draw_from(drawn_by, uniform[rows, step])  # [R]
            own = self._mixed(*(each.float().log_softmax(-1) for each in logits)).gather(-1, tokens[:, None])
            for row, token, log_prob in zip(rows, tokens.tolist(), own.squeeze(-1).tolist(), strict=True):
                written[row].append((token, log_prob))
            alive = [place for place, row in enumerate(rows) if written[row][-1][0] not in self._ends]
            rows = [rows[place] for place in alive]
            if not rows:
                break
            if len(alive) < len(ids):
                columns = torch.arange(ids.shape[1], device=device).expand(len(alive), -1)
                for reader in (student, teacher):
                    reader.move(torch.tensor(alive, device=device), columns)
            ids = torch.cat([ids[alive], tokens[alive, None]], -1)
            mask = torch.cat([mask[alive], mask.new_ones(len(alive), 1)], -1)
        return [self._response(prompt.id, own) for prompt, own in zip(prompts, written, strict=True)]

    def _mixed(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Log-probabilities of the mixture."""
        return (self.share * log_p.exp() + (1.0 - self.share) * log_q.exp()).log()

    def _response(self, prompt_id: str, written: list[tuple[int, float]]) -> Response:
        tokens, log_probs = zip(*written, strict=True)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Response(prompt_id, tokens, text, "stop" if tokens[-1] in self._ends else "length", log_probs)


class MixtureCurator(SampledCurator):
    """Responses by `MixtureGenerator`, with the weights of the round's start.

    Args:
        teacher_share: α in [0, 1), the teacher's share of the mixture.
        sampling: How tokens are drawn; None is temperature 1 without top-p, which MiniLLM's weights assume.
        rounds: How long a round lasts: `epoch`, `step`, or `{every: n}` optimizer steps.
        batch_size: Prompts continued at once.

    Raises:
        ConfigError: If a setting is out of range.
    """

    writer: ClassVar[str] = "mixture"

    def __init__(
        self,
        teacher_share: float = 0.2,
        sampling: Sampling | None = None,
        rounds: Rounds = "step",
        batch_size: int = 32,
    ) -> None:
        sampling = sampling or Sampling(temperature=1.0, top_p=1.0)
        super().__init__(sampling, rounds, MixtureGenerator(teacher_share, batch_size))


def _uniform(seed: int, length: int) -> Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

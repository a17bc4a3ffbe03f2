"""Teacher-mixed sampling: responses sampled token by token from a mixture of teacher and student."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from distillkit.curators import Rounds, SampledCurator
from distillkit.errors import check_range
from distillkit.generators import CachedDecoder, decoded, sample_from, sampling_log_probs
from distillkit.interfaces import Generator
from distillkit.models import base_model, eos_ids, evaluating, vocab_size
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer


class MixtureGenerator(Generator):
    """Samples each token from α·p + (1−α)·q, the teacher's and the student's distribution after `sampling`.

    Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 5.

    Args:
        teacher_share: α in [0, 1), the teacher's share of the mixture.
        batch_size: Number of prompts generated for at once, at least 1.

    Raises:
        ConfigError: If a value is outside its range.
    """

    needs_models = ("student", "teacher")

    def __init__(self, teacher_share: float = 0.2, batch_size: int = 32) -> None:
        check_range("MixtureGenerator.batch_size", batch_size, 1)
        check_range("MixtureGenerator.teacher_share", teacher_share, 0, 1, closed="left")
        self.share, self.batch_size = teacher_share, batch_size
        self._models = nn.ModuleDict()

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Uses both models with their current weights, without copying them."""
        self._models, self._tokenizer = cast(nn.ModuleDict, model), tokenizer
        self._ends = eos_ids(tokenizer, base_model(self._models["teacher"]))

    def identity(self) -> str:
        """Name and share of the mixture."""
        return f"mixture teacher_share={self.share}"

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        responses: dict[int, Response] = {}
        with evaluating(self._models):
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = Prompts(tuple(prompts[index] for index in indices), prompts.round)
                responses |= dict(zip(indices, self._generate_batch(batch, sampling), strict=True))
        return [responses[index] for index in range(len(prompts))]

    def _generate_batch(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Responses of a batch; finished rows are removed from it."""
        device = base_model(self._models["student"]).device
        vocab, max_length = vocab_size(self._tokenizer), sampling.max_new_tokens
        student, teacher = (CachedDecoder(self._models[name], vocab, lag=0) for name in ("student", "teacher"))
        width = max(len(prompt.input_ids) for prompt in prompts)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        ids = torch.tensor([[0] * (width - len(prompt.input_ids)) + list(prompt.input_ids) for prompt in prompts]).to(
            device
        )
        mask = (torch.arange(width) >= width - lengths[:, None]).long().to(device)  # [R, W]
        seeds = [sampling.seed_of(prompts.round, prompt.id) for prompt in prompts]
        uniform = torch.stack([_uniform(seed, max_length) for seed in seeds]).to(device)  # [R, max_length]
        generated: list[list[tuple[int, float]]] = [[] for _ in prompts]  # token and log-probability
        rows = list(range(len(prompts)))
        for step in range(max_length):
            logits = [decoder.read(ids, mask, 1)[:, 0].to(device) for decoder in (teacher, student)]
            mixture = self._mixed(*(sampling_log_probs(scores, sampling) for scores in logits))
            tokens = sample_from(mixture, uniform[rows, step])  # [R]
            full = self._mixed(*(scores.float().log_softmax(-1) for scores in logits))  # temperature 1, all tokens
            log_probs = full.gather(-1, tokens[:, None]).squeeze(-1)
            for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
                generated[row].append((token, log_prob))
            alive = [index for index, row in enumerate(rows) if generated[row][-1][0] not in self._ends]
            rows = [rows[index] for index in alive]
            if not rows:
                break
            if len(alive) < len(ids):
                columns = torch.arange(ids.shape[1], device=device).expand(len(alive), -1)
                for decoder in (student, teacher):
                    decoder.move(torch.tensor(alive, device=device), columns)
            ids = torch.cat([ids[alive], tokens[alive, None]], -1)
            mask = torch.cat([mask[alive], mask.new_ones(len(alive), 1)], -1)
        return [self._response(prompt, pairs) for prompt, pairs in zip(prompts, generated, strict=True)]

    def _mixed(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Log-probabilities of the mixture."""
        return (self.share * log_p.exp() + (1.0 - self.share) * log_q.exp()).log()

    def _response(self, prompt: Prompt, pairs: list[tuple[int, float]]) -> Response:
        tokens, log_probs = zip(*pairs, strict=True)
        text = decoded(self._tokenizer, tokens, self._ends, prompt)
        return Response(prompt.id, tokens, text, "stop" if tokens[-1] in self._ends else "length", log_probs)


class MixtureCurator(SampledCurator):
    """Responses of `MixtureGenerator`, with the weights at the start of the round.

    Args:
        teacher_share: α in [0, 1), the teacher's share of the mixture.
        sampling: Sampling of the tokens; None is temperature 1 without top-p, which MiniLLM's weights assume.
        rounds: Length of a round: `epoch`, `step`, or `{every: n}` optimizer steps.
        batch_size: Number of prompts generated for at once.

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

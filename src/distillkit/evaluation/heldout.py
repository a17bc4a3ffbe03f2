"""Held-out metrics: divergences to the teacher, and scores of the student's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distillkit import divergences
from distillkit.chunked.evaluate import gather_targets, gather_top_k, slices
from distillkit.chunked.memory import default_budget
from distillkit.errors import ConfigError
from distillkit.evaluation.means import Means
from distillkit.evaluation.rouge import rouge_l
from distillkit.interfaces import Generator, Verifier
from distillkit.types import Batch, Prompts, Sampling, Scores

_TENSORS = 8
"""`[n, V]` tensors that are alive at once."""

RESERVED_NAMES = ("kl", "nll", "acceptance", "rouge_l", "length", "finished", "positions", "step")
"""Names of metrics that verifiers can't have."""


@dataclass(frozen=True)
class Answer:
    """A held-out prompt with the reference answer and the student's, as text.

    Args:
        prompt: Text of the last turn.
        reference: The reference answer.
        student: The student's answer.
        prompt_id: The prompt's id.
        finish: Reason why the student's answer ended: `stop` or `length`.
        tokens: Number of tokens of the student's answer.
        positions: Number of tokens of the reference answer that the models scored.
        metrics: Held-out metrics of this prompt alone, by name.
    """

    prompt: str
    reference: str
    student: str
    prompt_id: str = ""
    finish: str = ""
    tokens: int = 0
    positions: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class HeldOut:
    """Held-out metrics: means over all response positions or answers of all ranks, in float64.

    It is no `nn.Module`: a run in half precision casts every module that it trains, and the sums with it.

    `kl` is KL(p‖q) in nats per token, `nll` the student's −log q of the reference responses in nats per token,
    `acceptance` the expected acceptance Σ min(p, q) of a token that the student drafts (Leviathan et al. 2022, arXiv
    2211.17192), `rouge_l` the ROUGE-L F-measure in percent of the student's greedy answers against the reference (Lin
    2004). Without a teacher there are only `nll` and `rouge_l`. With cached scores of the teacher's K most likely
    tokens, the values are bounds: the full distribution would give a `kl` at least, and an `acceptance` at most, as
    large.

    Args:
        verifiers: Verifiers that score the student's answers, by the name of their mean in the results.

    Raises:
        ConfigError: If a name is not an identifier, or is the name of another metric.
    """

    def __init__(self, verifiers: Mapping[str, Verifier] | None = None) -> None:
        self._means = Means()
        self.set_verifiers(verifiers or {})
        self.table: list[Answer] = []
        self._rows: list[dict[str, float]] = []

    def set_verifiers(self, verifiers: Mapping[str, Verifier]) -> None:
        """Replaces the verifiers that score the student's answers.

        Raises:
            ConfigError: If a name is not an identifier, or is the name of another metric.
        """
        for name in verifiers:
            if not name.isidentifier() or name in RESERVED_NAMES:
                reserved = "a metric of distillkit has it"
                reason = reserved if name in RESERVED_NAMES else "use letters, digits and underscores"
                raise ConfigError(f"model.metrics can't have the name {name!r}: {reason}.")
        self.verifiers = dict(verifiers)

    def names(self, with_teacher: bool) -> list[str]:
        """Names of the metrics.

        Args:
            with_teacher: Whether there is a teacher with the student's tokenizer.
        """
        return [*(("kl", "acceptance") if with_teacher else ()), "nll", "rouge_l", *self.verifiers]

    @property
    def needs_reference(self) -> bool:
        """True if every held-out prompt must come with a response."""
        return any(verifier.needs_reference for verifier in self.verifiers.values())

    def check(self, prompts: Prompts) -> None:
        """Refuses held-out prompts whose answers a verifier can't score."""
        for verifier in self.verifiers.values():
            verifier.check(prompts)

    @torch.no_grad()
    def update(self, student: Scores, teacher: Scores | None, batch: Batch) -> None:
        """Adds the positions of a batch."""
        # A rank without positions adds empty metrics: it takes part in the reduction too.
        step = max(1, default_budget(student.hidden.device) // (_TENSORS * 4 * student.vocab))
        parts: dict[str, list[Tensor]] = {}
        for part in slices(student.hidden.shape[0], step) or [slice(0, 0)]:
            logq = student.log_probs(part)
            parts.setdefault("nll", []).append(-gather_targets(logq, batch.targets[part]).double())
            if teacher is not None:
                logp = teacher.log_probs(part)
                if teacher.top_k_ids is not None:
                    logq = gather_top_k(logq, teacher.top_k_ids[part])
                parts.setdefault("kl", []).append(divergences.kl(logp, logq).double())
                parts.setdefault("acceptance", []).append(divergences.overlap(logp, logq).double())
        sums = {name: _sum_by_row(torch.cat(values), batch) for name, values in parts.items()}
        for name, row_sums in sums.items():
            self._means.add(name, row_sums, sum(batch.lengths))
        self._rows += [
            {"positions": float(count)} | {name: row_sums[row] / count for name, row_sums in sums.items() if count}
            for row, count in enumerate(batch.lengths)
        ]

    def answer(self, generator: Generator, prompts: Prompts, references: Sequence[str], sampling: Sampling) -> None:
        """Generates answers to `prompts`, compares them with `references`, and scores them with the verifiers.

        The metrics of each prompt are then in `table`: those of its reference row and those of its answer. The rows
        passed to `update` must be those of the first prompts, in the same order.
        """
        answers = generator.generate(prompts, sampling) if len(prompts) else []
        pairs = zip(answers, references, strict=True)
        metrics = {"rouge_l": [rouge_l(answer.text, reference) for answer, reference in pairs]}
        for name, verifier in self.verifiers.items():
            metrics[name] = [float(score) for score in verifier.verify(prompts, answers)]
        for name, values in metrics.items():
            self._means.add(name, values, len(values))
        reference_rows = [*self._rows, *({} for _ in prompts)]
        self.table = [
            Answer(
                prompt=str(prompt.messages[-1]["content"]),
                reference=references[index],
                student=answer.text,
                prompt_id=prompt.id,
                finish=answer.finish,
                tokens=len(answer.token_ids),
                positions=int(reference_rows[index].get("positions", 0)),
                metrics={name: value for name, value in reference_rows[index].items() if name != "positions"}
                | {name: values[index] for name, values in metrics.items()},
            )
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics over all ranks, 0-dim float64 tensors on the CPU, and resets."""
        metrics = {name: torch.tensor(mean, dtype=torch.float64) for name, mean in self._means.reduce().items()}
        self.reset()
        return metrics

    def reset(self) -> None:
        """Discards all accumulated values."""
        self._means = Means()
        self._rows = []


def _sum_by_row(values: Tensor, batch: Batch) -> list[float]:
    """The sum of `[N]` values over the positions of each row."""
    sums = torch.zeros(len(batch.lengths), dtype=values.dtype, device=values.device)
    row_sums: list[float] = sums.index_add(0, batch.rows, values).tolist()
    return row_sums

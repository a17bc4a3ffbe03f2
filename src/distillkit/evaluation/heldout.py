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
from distillkit.interfaces import Generator, Loss, Verifier
from distillkit.types import Batch, Prompts, Sampling, Scores

_TENSORS = 8
"""`[n, V]` tensors that are alive at once."""

GOLD_NAMES = ("gold_nll", "gold_rouge_l", "loss")
"""Names of metrics that need the data's own held-out responses."""

RESERVED_NAMES = ("kl", "nll", "acceptance", "rouge_l", *GOLD_NAMES, "length", "finished", "positions", "step")
"""Names of metrics that verifiers can't have."""


_COUNTS = ("positions", "gold_positions")
_LOSS, _UNITS = "loss of component ", "units of component "


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
        gold: The data's own answer, where the reference is another one, the teacher's; empty if there is none.
        gold_positions: Number of tokens of the data's own answer that the student scored.
        earlier: The turns before `prompt`, with their `role` and `content`.
    """

    prompt: str
    reference: str
    student: str
    prompt_id: str = ""
    finish: str = ""
    tokens: int = 0
    positions: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    gold: str = ""
    gold_positions: int = 0
    earlier: list[dict[str, str]] = field(default_factory=list)


class HeldOut:
    """Held-out metrics: means over all response positions or answers of all ranks, in float64.

    It is no `nn.Module`: a run in half precision casts every module that it trains, and the sums with it.

    `kl` is KL(p‖q) in nats per token, `nll` the student's −log q of the reference responses in nats per token,
    `acceptance` the expected acceptance Σ min(p, q) of a token that the student drafts (Leviathan et al. 2022, arXiv
    2211.17192), `rouge_l` the ROUGE-L F-measure in percent of the student's greedy answers against the reference (Lin
    2004). Without a teacher there are only `nll` and `rouge_l`. With cached scores of the teacher's K most likely
    tokens, the values are bounds: the full distribution would give a `kl` at least, and an `acceptance` at most, as
    large.

    Where the data has answers beside the teacher's, `gold_nll` and `gold_rouge_l` are the same two against these.
    `loss` is the run's loss on the data's answers, without those terms that no such answer counts for.

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
        self._has_gold = False

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

    def expect_gold(self, has_gold: bool) -> None:
        """Sets whether rows with the writer `dataset` are the data's own answers, beside those of a teacher."""
        self._has_gold = has_gold

    @torch.no_grad()
    def update(self, student: Scores, teacher: Scores | None, batch: Batch, loss: Loss | None = None) -> None:
        """Adds the positions of a batch.

        Args:
            student: Scores by the student.
            teacher: Scores by the teacher; None if there is none with the student's tokenizer.
            batch: Rows of the prompts: the reference, followed by the data's own answer if that is another one.
            loss: The run's loss; None if it can't be evaluated on the data's answers.
        """
        is_gold = tuple(self._has_gold and writer == "dataset" for writer in batch.writer)
        sums = self._row_sums(student, teacher, batch)
        self._add_means(sums, batch, [row for row, gold in enumerate(is_gold) if not gold])
        if self._has_gold:
            rows = [row for row, gold in enumerate(is_gold) if gold]
            self._add_means({"gold_nll": sums["nll"]}, batch, rows)
        if loss is not None and (self._has_gold or teacher is None):
            self._add_loss(loss, student, teacher, batch, is_gold if self._has_gold else (True,) * len(is_gold))
        for row, (count, gold) in enumerate(zip(batch.lengths, is_gold, strict=True)):
            if gold:  # its reference is the row before
                self._rows[-1] |= {"gold_positions": float(count), "gold_nll": sums["nll"][row] / max(count, 1)}
            else:
                means = {name: row_sums[row] / count for name, row_sums in sums.items() if count}
                self._rows.append({"positions": float(count)} | means)

    def _row_sums(self, student: Scores, teacher: Scores | None, batch: Batch) -> dict[str, list[float]]:
        """The metrics of each position, summed over those of each row."""
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
        return {name: _sum_by_row(torch.cat(values), batch) for name, values in parts.items()}

    def _add_means(self, sums: Mapping[str, Sequence[float]], batch: Batch, rows: Sequence[int]) -> None:
        for name, row_sums in sums.items():
            self._means.add(name, [row_sums[row] for row in rows], sum(batch.lengths[row] for row in rows))

    def _add_loss(
        self, loss: Loss, student: Scores, teacher: Scores | None, batch: Batch, chosen: tuple[bool, ...]
    ) -> None:
        """Adds the total and the units of each component of the loss on some rows."""
        part, index = batch.limited_to(chosen)
        output = loss(student.select(index), None if teacher is None else teacher.select(index), part)
        pairs = zip(output.total.reshape(-1).tolist(), output.units.reshape(-1).tolist(), strict=True)
        for component, (total, units) in enumerate(pairs):
            self._means.add(f"{_LOSS}{component}", [total], 1)
            self._means.add(f"{_UNITS}{component}", [units], 1)

    def answer(
        self,
        generator: Generator,
        prompts: Prompts,
        references: Sequence[str],
        sampling: Sampling,
    ) -> None:
        """Generates answers to `prompts`, compares them with `references`, and scores them with the verifiers.

        The metrics of each prompt are then in `table`: those of its reference row and those of its answer. The rows
        passed to `update` must be those of the first prompts, in the same order.
        """
        answers = generator.generate(prompts, sampling) if len(prompts) else []
        golds = [prompt.reference if self._has_gold else None for prompt in prompts]
        metrics: list[dict[str, float]] = [
            {"rouge_l": rouge_l(answer.text, reference)}
            | ({} if gold is None else {"gold_rouge_l": rouge_l(answer.text, gold)})
            for answer, reference, gold in zip(answers, references, golds, strict=True)
        ]
        for name, verifier in self.verifiers.items():
            for row, score in zip(metrics, verifier.verify(prompts, answers), strict=True):
                row[name] = float(score)
        for name in ("rouge_l", *(("gold_rouge_l",) if self._has_gold else ()), *self.verifiers):
            values = [row[name] for row in metrics if name in row]
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
                metrics={name: value for name, value in reference_rows[index].items() if name not in _COUNTS}
                | metrics[index],
                gold=golds[index] or "",
                gold_positions=int(reference_rows[index].get("gold_positions", 0)),
                earlier=[{key: str(turn[key]) for key in ("role", "content")} for turn in prompt.messages[:-1]],
            )
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics over all ranks, 0-dim float64 tensors on the CPU, and resets."""
        means = self._means.reduce()
        self.reset()
        metrics = {name: mean for name, mean in means.items() if not name.startswith((_LOSS, _UNITS))}
        units = {name.removeprefix(_UNITS): mean for name, mean in means.items() if name.startswith(_UNITS)}
        terms = [means[_LOSS + component] / mean for component, mean in units.items() if mean > 0]
        if terms:
            metrics["loss"] = sum(terms)
        return {name: torch.tensor(metrics[name], dtype=torch.float64) for name in sorted(metrics)}

    def reset(self) -> None:
        """Discards all accumulated values."""
        self._means = Means()
        self._rows = []


def _sum_by_row(values: Tensor, batch: Batch) -> list[float]:
    """The sum of `[N]` values over the positions of each row."""
    sums = torch.zeros(len(batch.lengths), dtype=values.dtype, device=values.device)
    row_sums: list[float] = sums.index_add(0, batch.rows, values).tolist()
    return row_sums

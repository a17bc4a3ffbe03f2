"""What each validation says about the student, on held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text.rouge import rouge_score

from distillkit import divergences
from distillkit.errors import ConfigError
from distillkit.interfaces import Generator, Verifier
from distillkit.losses.budget import default_budget
from distillkit.losses.slicing import gathered, own_log_probs, slices
from distillkit.types import Batch, Prompts, Sampling, Scores

_TENSORS = 8
"""`[n, V]` tensors that are alive at once."""

OWN = ("kl", "nll", "acceptance", "rouge_l", "length", "finished", "positions", "step")
"""Names of figures that verifiers can't have."""


@dataclass(frozen=True)
class Answer:
    """A held-out prompt with the reference's answer and the student's, as text.

    Args:
        prompt: The last turn asked.
        reference: The reference's answer.
        student: The student's answer.
        prompt_id: The prompt's id.
        finish: Why the student's answer ended.
        tokens: Tokens of it.
        positions: Tokens of the reference's answer that both models scored.
        figures: What was measured on this prompt alone, by name.
    """

    prompt: str
    reference: str
    student: str
    prompt_id: str = ""
    finish: str = ""
    tokens: int = 0
    positions: int = 0
    figures: dict[str, float] = field(default_factory=dict)


class HeldOut(nn.Module):
    """Held-out figures: means over all response positions of all ranks.

    `kl` is KL(p‖q) in nats per token, `nll` the student's −log q of the reference responses in nats per token,
    `acceptance` the expected acceptance Σ min(p, q) of a token that the student drafts (Leviathan et al. 2022, arXiv
    2211.17192), `rouge_l` the ROUGE-L F-measure in percent of the student's greedy answers against the reference (Lin
    2004). Without a teacher only `nll` and `rouge_l` are given. A teacher that kept its K most likely tokens gives
    bounds: `kl` is at most, and `acceptance` at least, what the whole distribution would give.

    Args:
        verifiers: Judges of the student's answers, by the name under which the mean of their numbers is given.

    Raises:
        ConfigError: If a name is no identifier, or another figure has it.
    """

    def __init__(self, verifiers: Mapping[str, Verifier] | None = None) -> None:
        super().__init__()
        self.kl, self.nll, self.acceptance, self.rouge = (_mean() for _ in range(4))
        self.judge(verifiers or {})
        self.table: list[Answer] = []
        self._rows: list[dict[str, float]] = []

    def judge(self, verifiers: Mapping[str, Verifier]) -> None:
        """Has these judge the student's answers from now on.

        Raises:
            ConfigError: If a name is no identifier, or another figure has it.
        """
        for name in verifiers:
            if not name.isidentifier() or name in OWN:
                why = "another figure has it" if name in OWN else "it must be letters, digits and underscores"
                raise ConfigError(f"model.metrics can't have the name {name!r}: {why}.")
        self.verifiers = dict(verifiers)
        self.judged = nn.ModuleDict({f"of_{name}": _mean() for name in verifiers})  # ModuleDict has names of its own

    @property
    def needs_reference(self) -> bool:
        """Whether every held-out prompt must come with a response of its own."""
        return any(own.needs_reference for own in self.verifiers.values())

    def check(self, prompts: Prompts) -> None:
        """Refuses held-out prompts the answers to which a verifier can't judge."""
        for verifier in self.verifiers.values():
            verifier.check(prompts)

    @torch.no_grad()
    def update(self, student: Scores, teacher: Scores | None, batch: Batch) -> None:
        """Counts in the positions of a batch."""
        # A rank without positions takes part in the reduction, so it counts in none.
        step = max(1, default_budget(student.hidden.device) // (_TENSORS * 4 * student.vocab))
        found: dict[str, list[Tensor]] = {}
        for part in slices(student.hidden.shape[0], step) or [slice(0, 0)]:
            logq = student.log_probs(part)
            found.setdefault("nll", []).append(-own_log_probs(logq, batch.targets[part]).double())
            if teacher is not None:
                logp = teacher.log_probs(part)
                if teacher.support is not None:
                    logq = gathered(logq, teacher.support[part])
                found.setdefault("kl", []).append(divergences.kl(logp, logq).double())
                found.setdefault("acceptance", []).append(divergences.overlap(logp, logq).double())
        figures = {name: torch.cat(values) for name, values in found.items()}  # [N] each
        for name, values in figures.items():
            getattr(self, name).update(values)
        self._rows += _by_row(figures, batch)

    def answer(self, generator: Generator, prompts: Prompts, references: Sequence[str], sampling: Sampling) -> None:
        """Has the student answer `prompts`, compares with `references`, and has the verifiers judge.

        The figures of each prompt are then in `table`: those of the rows that were counted, which are taken to be of
        the first prompts in their order, and those of the answer.
        """
        answers = generator.generate(prompts, sampling) if len(prompts) else []
        figures = {"rouge_l": [_rouge(own.text, reference) for own, reference in zip(answers, references, strict=True)]}
        self.rouge.update(self._tensor(figures["rouge_l"]))
        for name, verifier in self.verifiers.items():
            figures[name] = [float(own) for own in verifier.verify(prompts, answers)]
            self._of(name).update(self._tensor(figures[name]))
        scored = [*self._rows, *({} for _ in prompts)]
        self.table = [
            Answer(
                str(prompt.messages[-1]["content"]), references[place], own.text, prompt.id, own.finish,
                len(own.token_ids), int(scored[place].get("positions", 0)),
                {name: value for name, value in scored[place].items() if name != "positions"}
                | {name: values[place] for name, values in figures.items()},
            )
            for place, (prompt, own) in enumerate(zip(prompts, answers, strict=True))
        ]  # fmt: skip

    def _of(self, name: str) -> Metric:
        metric = self.judged[f"of_{name}"]
        assert isinstance(metric, Metric)
        return metric

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.rouge.device)

    def compute(self) -> dict[str, Tensor]:
        """The figures over all ranks, and starts anew."""
        figures = {"nll": self.nll.compute(), "rouge_l": self.rouge.compute()}
        if self.kl.update_called:
            figures |= {"kl": self.kl.compute(), "acceptance": self.acceptance.compute()}
        figures |= {name: self._of(name).compute() for name in self.verifiers}
        self.reset()
        return figures

    def reset(self) -> None:
        """Starts anew."""
        for metric in (self.kl, self.nll, self.acceptance, self.rouge, *map(self._of, self.verifiers)):
            metric.reset()
        self._rows = []


def _mean() -> Metric:
    # A NaN has to show, and ranks that hold different numbers of values have to agree with one that holds them all.
    return MeanMetric(nan_strategy="disable").set_dtype(torch.float64)


def _rouge(answer: str, reference: str) -> float:
    """ROUGE-L F-measure in percent."""
    return 100.0 * float(rouge_score(answer, reference, rouge_keys="rougeL")["rougeL_fmeasure"])


def _by_row(figures: Mapping[str, Tensor], batch: Batch) -> list[dict[str, float]]:
    """The means over each row's positions, and how many there are; a row without positions has no figures."""
    sums = {
        name: torch.zeros(len(batch.lengths), dtype=values.dtype, device=values.device).index_add(0, batch.rows, values)
        for name, values in figures.items()
    }
    table = {name: values.tolist() for name, values in sums.items()}
    return [
        {"positions": float(count)} | {name: table[name][row] / count for name in table if count}
        for row, count in enumerate(batch.lengths)
    ]

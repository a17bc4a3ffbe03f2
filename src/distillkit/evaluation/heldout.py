"""What each validation says about the student, on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text.rouge import rouge_score

from distillkit import divergences
from distillkit.interfaces import Generator
from distillkit.losses.budget import default_budget
from distillkit.losses.slicing import gathered, own_log_probs, slices
from distillkit.types import Batch, Prompts, Sampling, Scores

_TENSORS = 8
"""`[n, V]` tensors that are alive at once."""


@dataclass(frozen=True)
class Answer:
    """A held-out prompt with the reference's answer and the student's, as text."""

    prompt: str
    reference: str
    student: str


class HeldOut(nn.Module):
    """Held-out figures: means over all response positions of all ranks.

    `kl` is KL(p‖q) in nats per token, `nll` the student's −log q of the reference responses in nats per token,
    `acceptance` the expected acceptance Σ min(p, q) of a token that the student drafts (Leviathan et al. 2022, arXiv
    2211.17192), `rouge_l` the ROUGE-L F-measure in percent of the student's greedy answers against the reference (Lin
    2004). Without a teacher only `nll` and `rouge_l` are given. A teacher that kept its K most likely tokens gives
    bounds: `kl` is at most, and `acceptance` at least, what the whole distribution would give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kl, self.nll, self.acceptance, self.rouge = (_mean() for _ in range(4))
        self.table: list[Answer] = []

    @torch.no_grad()
    def update(self, student: Scores, teacher: Scores | None, batch: Batch) -> None:
        """Counts in the positions of a batch."""
        # A rank without positions takes part in the reduction, so it counts in none.
        step = max(1, default_budget(student.hidden.device) // (_TENSORS * 4 * student.vocab))
        for part in slices(student.hidden.shape[0], step) or [slice(0, 0)]:
            logq = student.log_probs(part)
            self.nll.update(-own_log_probs(logq, batch.targets[part]).double())
            if teacher is not None:
                logp = teacher.log_probs(part)
                if teacher.support is not None:
                    logq = gathered(logq, teacher.support[part])
                self.kl.update(divergences.kl(logp, logq).double())
                self.acceptance.update(divergences.overlap(logp, logq).double())

    def answer(self, generator: Generator, prompts: Prompts, references: Sequence[str], sampling: Sampling) -> None:
        """Has the student answer `prompts`, and compares with `references`."""
        answers = generator.generate(prompts, sampling) if len(prompts) else []
        self.table = [
            Answer(str(prompt.messages[-1]["content"]), reference, response.text)
            for prompt, reference, response in zip(prompts, references, answers, strict=True)
        ]
        scores = [rouge_score(row.student, row.reference, rouge_keys="rougeL")["rougeL_fmeasure"] for row in self.table]
        self.rouge.update(torch.tensor(scores, dtype=torch.float64, device=self.rouge.device))

    def compute(self) -> dict[str, Tensor]:
        """The figures over all ranks, and starts anew."""
        figures = {"nll": self.nll.compute(), "rouge_l": 100.0 * self.rouge.compute()}
        if self.kl.update_called:
            figures |= {"kl": self.kl.compute(), "acceptance": self.acceptance.compute()}
        self.reset()
        return figures

    def reset(self) -> None:
        """Starts anew."""
        for metric in (self.kl, self.nll, self.acceptance, self.rouge):
            metric.reset()


def _mean() -> Metric:
    # A NaN has to show, and ranks that hold different numbers of values have to agree with one that holds them all.
    return MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

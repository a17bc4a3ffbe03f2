"""What each validation says about the student, on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.text.rouge import ROUGEScore

from distillkit import divergences
from distillkit.interfaces import Generator
from distillkit.losses.slicing import slices
from distillkit.types import Batch, Prompts, Sampling, Scores


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
    2004). Without a teacher only `nll` and `rouge_l` are given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kl, self.nll, self.acceptance = MeanMetric(), MeanMetric(), MeanMetric()
        self.rouge = ROUGEScore(rouge_keys="rougeL")
        self.table: list[Answer] = []

    @torch.no_grad()
    def update(self, student: Scores, teacher: Scores | None, batch: Batch) -> None:
        """Counts in the positions of a batch."""
        for part in slices(student.hidden.shape[0], student.vocab):
            logq = student.log_probs(part)
            self.nll.update(-logq.gather(-1, batch.targets[part, None]).double())
            if teacher is not None:
                logp = teacher.log_probs(part)
                self.kl.update(divergences.kl(logp, logq).double())
                self.acceptance.update(divergences.overlap(logp, logq).double())

    def answer(self, generator: Generator, prompts: Prompts, references: Sequence[str], sampling: Sampling) -> None:
        """Has the student answer `prompts`, and compares with `references`."""
        answers = generator.generate(prompts, sampling) if len(prompts) else []
        self.table = [
            Answer(str(prompt.messages[-1]["content"]), reference, response.text)
            for prompt, reference, response in zip(prompts, references, answers, strict=True)
        ]
        if self.table:
            self.rouge.update([row.student for row in self.table], [row.reference for row in self.table])

    def compute(self) -> dict[str, Tensor]:
        """The figures over all ranks, and starts anew."""
        figures = {"nll": self.nll.compute(), "rouge_l": 100.0 * self.rouge.compute()["rougeL_fmeasure"]}
        if self.kl.update_called:
            figures |= {"kl": self.kl.compute(), "acceptance": self.acceptance.compute()}
        self.reset()
        return figures

    def reset(self) -> None:
        """Starts anew."""
        for metric in (self.kl, self.nll, self.acceptance, self.rouge):
            metric.reset()

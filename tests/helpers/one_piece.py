"""Reference losses, computed from all logits at once without slices.

Letters: N response positions, D hidden width, V vocabulary, K kept tokens of a teacher.
"""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, logsigmoid

from distillkit import divergences, registry
from distillkit.chunked.output_head import OutputHead
from distillkit.losses import (
    DPKD,
    CrossEntropy,
    DistiLLM2,
    ForwardKL,
    GeneralizedJSD,
    JeffreysKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TokenLoss,
    WeightedSum,
)
from distillkit.schedules import AdaptiveAlpha, Constant
from distillkit.testing import make_batch
from distillkit.types import Progress, Scores, Slicing, Summary

V, D, K = 13, 5, 4
STUDENT, TEACHER = 2, 6  # seeds: some of the student's responses are likelier to it than to the teacher, some not
WRITERS = ("teacher", "student") * 3
PAIRS = (0, 0, 1, 1, 2, 2)
BATCH = make_batch((3, 1, 0, 4, 2, 3), WRITERS, PAIRS, V)
N = BATCH.num_tokens
SIZES = (1, -(-N // 3), 10 * N)
ONE = make_batch((0, 1), WRITERS[:2], PAIRS[:2], V)
PAIR = make_batch((1, 5), WRITERS[:2], PAIRS[:2], V)


class Overlap(TokenLoss):
    """A stranger's loss, by autograd: 1 − Σ √(p·q)."""

    def divergence(self, logp, logq):
        return 1 - (0.5 * (logp + logq)).exp().sum(-1)


class Cubed(ForwardKL):
    """Another divergence than that of the class whose closed form it inherits."""

    def divergence(self, logp, logq):
        return divergences.kl(logp, logq) ** 3


def adapted(loss):
    """A DistiLLM2 behind its warm-up, whose skews differ from row to row."""
    gap = torch.tensor(0.02)
    summary = Summary(gap, gap, gap, torch.tensor(3.0))
    loss.update(Progress(1, 4), {f"gap_{side}": summary for side in ("teacher", "student")})
    return loss


def sum_of_losses():
    return WeightedSum([ForwardKL(), CrossEntropy(), DPKD(), DistiLLM2(alpha=0.2)], [0.5, 0.25, 2.0, 1.5])


# How to make an installed loss whose constructor asks for something.
MADE = {"WeightedSum": sum_of_losses}
INSTALLED = registry.available("loss")
_FOUND = {name: MADE.get(name, registry.get("loss", name))() for name in INSTALLED}
# A plugin's loss of another kind has no formula here.
_KNOWN = (TokenLoss, CrossEntropy, DPKD, DistiLLM2, WeightedSum)
LOSSES = {name: loss for name, loss in _FOUND.items() if isinstance(loss, _KNOWN)} | {
    "ForwardKL, token_mean, temperature": ForwardKL("token_mean", temperature=2.0, rescale=True),
    "ReverseKL, temperature": ReverseKL(temperature=0.5),
    "JeffreysKL 0.2": JeffreysKL(weight=0.2),
    "GeneralizedJSD 0.9, temperature": GeneralizedJSD(beta=0.9, temperature=3.0, rescale=True),
    "SkewKL 0": SkewKL(alpha=0.0),
    "SkewKL 0.8, token_mean": SkewKL(alpha=0.8, reduction="token_mean"),
    "SkewReverseKL, detached": SkewReverseKL(alpha=0.4, detach_mixture=True),
    "CrossEntropy, token_mean": CrossEntropy(reduction="token_mean"),
    "DPKD 5": DPKD(beta=5.0),
    "DistiLLM2, numbers": DistiLLM2(alpha=0.3, beta=0.25, reduction="token_mean"),
    "DistiLLM2, no skew": DistiLLM2(alpha=0.0, beta=0.5),
    "DistiLLM2, adapted": adapted(DistiLLM2(AdaptiveAlpha(initial=0.25, min=0.0, max=0.9, warmup_steps=1))),
    "DistiLLM2, detached": DistiLLM2(alpha=Constant(0.3), detach_mixture=True),
    "by autograd": Overlap(),
    "by autograd, temperature": Overlap("token_mean", temperature=2.0, rescale=True),
    "inherited gradient": Cubed(),
}


class Model(nn.Module):
    """Embedding, a layer and a head, with random weights."""

    max_positions = None
    """Maximum number of positions in a slice of a loss on the scores."""

    def __init__(self, seed, tied=True, bias=False, scale=1.0, softcap=None, width=V):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(width, D)
            self.mix = nn.Linear(D, D)
            self.head = nn.Linear(D, width, bias=bias)
            nn.init.normal_(self.head.weight)
        if tied:
            self.head.weight = self.embedding.weight
        self.scale, self.softcap = scale, softcap
        self.double()

    def hidden(self, batch):
        return torch.tanh(self.mix(self.embedding(batch.input_ids))).flatten(0, 1)[batch.positions]

    def scores(self, batch, memory=None):
        head = OutputHead(self.head, V, self.scale, self.softcap)
        return Scores(self.hidden(batch), head, V, slicing=Slicing(memory, max_positions=self.max_positions))

    def logits(self, batch):
        """`[N, V]` in one piece, without the head under test."""
        logits = self.scale * linear(self.hidden(batch), self.head.weight, self.head.bias)[:, :V]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "bias": {"tied": False, "bias": True},
    "tied with bias": {"bias": True},
    "soft cap": {"softcap": 2.0},
    "scale": {"tied": False, "scale": 0.3},
    "wide": {"tied": False, "bias": True, "scale": 1.5, "softcap": 3.0, "width": V + 4},
}


class Whole:
    """Each loss, computed from all logits `[N, V]` at once; with `top_k_ids` `[N, K]` from K tokens and the rest."""

    def __init__(self, batch, student, teacher, top_k_ids=None):
        self.batch, self.student, self.teacher, self.top_k_ids = batch, student, teacher, top_k_ids
        self.lengths = torch.tensor(batch.lengths)

    def of(self, loss):
        """Total `[]` or `[C]`."""
        if isinstance(loss, WeightedSum):
            parts = zip(loss.losses, loss.weights, strict=True)
            return torch.cat([weight * self.of(part).reshape(-1) for part, weight in parts])
        if isinstance(loss, TokenLoss):
            values = loss.divergence(*self.log_probs(loss.temperature)) * loss.scale
            return (values * self.weights(loss.reduction)).sum()
        if isinstance(loss, CrossEntropy):
            nats = cross_entropy(self.student, self.batch.targets, reduction="none")
            return (nats * self.weights(loss.reduction)).sum()
        return {DPKD: self.dpkd, DistiLLM2: self.distillm2}[type(loss)](loss)

    def log_probs(self, temperature=1.0):
        """Both models' over V, or over the teacher's K tokens and the rest."""
        logq = (self.student / temperature).log_softmax(-1)
        logp = (self.teacher / temperature).log_softmax(-1)
        return self.columns(logp), self.columns(logq)

    def columns(self, logs):
        if self.top_k_ids is None:
            return logs
        in_top_k = torch.zeros_like(logs, dtype=torch.bool).scatter(-1, self.top_k_ids, True)
        rest = torch.where(in_top_k, 0.0, logs.exp()).sum(-1, keepdim=True).log()
        return torch.cat([logs.gather(-1, self.top_k_ids), rest], -1)

    def weights(self, reduction):
        counts = self.lengths[self.batch.rows].to(self.student)
        return 1 / counts if reduction == "sequence_mean" else torch.ones_like(counts)

    def likelihoods(self, logits):
        """Mean log-probability of each row's own tokens, `[B]`; 0 for a row without any."""
        nats = cross_entropy(logits, self.batch.targets, reduction="none")
        means = [-row.mean() if len(row) else row.sum() for row in nats.split(self.batch.lengths)]
        return torch.stack(means)

    def rows(self, side):
        return [row for row, writer in enumerate(self.batch.writer) if writer == side and self.batch.lengths[row]]

    def dpkd(self, loss):
        logq, logp = self.likelihoods(self.student), self.likelihoods(self.teacher)
        total = 0.0 * logq.sum()
        for chosen in self.rows("teacher"):
            for rejected in self.rows("student"):
                if self.batch.pair[chosen] == self.batch.pair[rejected]:
                    margin = (logq[chosen] - logq[rejected]) - (logp[chosen] - logp[rejected])
                    total = total - logsigmoid(loss.beta * margin)
        return total

    def distillm2(self, loss):
        beta, weights = loss.beta.value.item(), self.weights(loss.reduction)
        logp, logq = self.log_probs()
        gaps = self.likelihoods(self.teacher).exp() - self.likelihoods(self.student).exp()
        by_teacher = by_student = 0.0 * logq.sum()
        for row in self.rows("teacher"):
            mask, alpha = self.batch.rows == row, self.skew(loss.alpha_teacher, gaps[row].item())
            p, q = logp[mask].exp(), logq[mask].exp()
            nats = p * (p / (alpha * p + (1 - alpha) * q)).log()
            by_teacher = by_teacher + (nats.sum(-1) * weights[mask]).sum()
        for row in self.rows("student"):
            mask, alpha = self.batch.rows == row, self.skew(loss.alpha_student, -gaps[row].item())
            p, q = logp[mask].exp(), logq[mask].exp()
            nats = q * (q / ((1 - alpha) * p + alpha * (q.detach() if loss.detach_mixture else q))).log()
            by_student = by_student + (nats.sum(-1) * weights[mask]).sum()
        return torch.stack([(1 - beta) * by_teacher, beta * by_student])

    def skew(self, schedule, gap):
        """α of a row: a number, or α₀ while the warm-up lasts and clip(1 − (1 − α₀)·m/g) after it."""
        start = schedule.value.item()
        if not isinstance(schedule, AdaptiveAlpha) or schedule.steps < schedule.warmup_steps:
            return start
        if gap <= 0:
            return schedule.min
        alpha = 1 - (1 - start) * schedule.reference_gap.item() / gap
        return min(max(alpha, schedule.min), schedule.max)


def both_totals(total):
    """Components weighed differently, so that none can stand for another."""
    return (total.reshape(-1) * torch.arange(1, total.numel() + 1).to(total)).sum()


def value_and_gradients(total, parameters):
    total = both_totals(total)
    return total.detach(), *torch.autograd.grad(total, parameters)


def by_loss(loss, student, teacher, batch, memory=None):
    output = loss(student.scores(batch, memory), teacher.scores(batch) if loss.needs_teacher else None, batch)
    return value_and_gradients(output.total, list(student.parameters()))


def in_one_piece(loss, student, teacher, batch):
    whole = Whole(batch, student.logits(batch), teacher.logits(batch).detach())
    return value_and_gradients(whole.of(loss), list(student.parameters()))


def assert_same(results, expected, tolerance, floor=0.0):
    """Each tensor is off by at most `tolerance` of its largest entry; the value may be by `floor` besides."""
    assert len(results) == len(expected) > 1
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == reference.shape
        assert (result.double() - reference.double()).abs().max() <= tolerance * reference.abs().max() + floor
        floor = 0.0


def copied(loss):
    """The loss in float64; schedules keep their precision."""
    return copy.deepcopy(loss).double()

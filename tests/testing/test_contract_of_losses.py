"""The contract finds each kind of broken loss, and says which promise it breaks."""

import re
import subprocess
import sys

import pytest
import torch

from distillkit import divergences
from distillkit.interfaces import Loss
from distillkit.losses import ForwardKL, TokenLoss
from distillkit.testing import LossContract, TokenLossContract, check_loss, make_batch, make_rows
from distillkit.types import LossOutput, Scores


class Plain(Loss):
    """A sound loss that a broken one differs from in one line: Σ KL over all positions."""

    def forward(self, student: Scores, teacher: Scores, batch):
        values = divergences.kl(teacher.log_probs(), student.log_probs())
        return LossOutput(self.total(values, batch), self.units(batch), self.metrics(values, batch))

    def units(self, batch):
        return torch.tensor(float(batch.num_tokens), dtype=torch.float64)

    def total(self, values, batch):
        return values.sum()

    def metrics(self, values, batch):
        return {"kl": values.detach()}


class TakesAMean(Plain):
    def total(self, values, batch):
        return values.sum() / max(len(values), 1)


class CountsInForward(Plain):
    def forward(self, student, teacher, batch):
        output = super().forward(student, teacher, batch)
        return LossOutput(output.total, output.units + 1, output.metrics)


class CountsInFloat32(Plain):
    def units(self, batch):
        return super().units(batch).float()


class CountsPadding(Plain):
    def total(self, values, batch):
        return values.sum() * batch.input_ids.numel()


class ReadsPrompts(Plain):
    def total(self, values, batch):
        return values.sum() + 0.1 * batch.input_ids[~batch.response_mask & batch.attention_mask].sum()


class ReturnsAConstantWithoutPositions(Plain):
    def total(self, values, batch):
        return values.sum() if batch.num_tokens else torch.zeros(())


class DividesByNothing(Plain):
    def total(self, values, batch):
        return values.mean() * len(values)


class KeepsTheGraphInAMetric(Plain):
    def metrics(self, values, batch):
        return {"kl": values}


class ReportsAMatrix(Plain):
    def metrics(self, values, batch):
        return {"kl": values.detach()[:, None]}


class ReportsWhatItMet(Plain):
    def metrics(self, values, batch):
        return {f"kl_row_{row}": values.detach().mean() for row in set(batch.rows.tolist())}


class NamesItsBatch(Plain):
    def metrics(self, values, batch):
        return {"kl": values.detach()} if batch.num_tokens else {}


class LeavesLogSpace(Plain):
    def forward(self, student, teacher, batch):
        p, q = teacher.log_probs().exp(), student.log_probs().exp()
        values = (p * (p / q).log()).sum(-1)
        return LossOutput(values.sum(), self.units(batch), {"kl": values.detach()})


class StopsItsGradient(Plain):
    def total(self, values, batch):
        return (values * values.detach()).sum()


class DependsOnSlices(Plain):
    def forward(self, student, teacher, batch):
        positions = student.slicing.max_positions or batch.num_tokens + 1
        output = super().forward(student, teacher, batch)
        return LossOutput(output.total * (1 + 1 / positions), output.units, output.metrics)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (TakesAMean, "return a sum and a count, never a mean"),
        (CountsInForward, "must equal the units that forward returns"),
        (CountsInFloat32, "units must be float64 on the CPU"),
        (CountsPadding, "must not change the loss"),
        (ReadsPrompts, "must not change the loss"),
        (ReturnsAConstantWithoutPositions, "the total must have a graph, even without response positions"),
        (DividesByNothing, "without response positions the total must be 0, got nan"),
        (KeepsTheGraphInAMetric, "the metric kl must be detached"),
        (ReportsAMatrix, "the metric kl must be a scalar or a vector"),
        (ReportsWhatItMet, "names must not depend on the batch"),
        (NamesItsBatch, "names must not depend on the batch"),
        (LeavesLogSpace, "extreme logits give"),
        (StopsItsGradient, "the gradient must match the value"),
        (DependsOnSlices, r"slices of \d+ positions must not change the total"),
    ],
)
def test_a_broken_loss_is_found(broken, promise):
    found = failures(broken())
    assert any(re.search(promise, sentence) for sentence in found), found
    assert all(sentence.startswith(f"{broken.__name__} breaks its contract: ") for sentence in found)


def failures(loss):
    """What each promise says of a loss: one by one, because the first that is broken would hide the others."""
    contract = TokenLossContract() if isinstance(loss, TokenLoss) else LossContract()
    contract.make = lambda: loss
    found = []
    for name in dir(contract):
        if name.startswith("test_"):
            try:
                getattr(contract, name)()
            except AssertionError as error:
                found.append(str(error))
    return found


def test_a_sound_loss_passes_and_is_not_changed():
    assert failures(Plain()) == []
    check_loss(Plain())
    loss = ForwardKL()
    check_loss(loss)
    assert not loss.state_dict()


class IsCrossEntropy(TokenLoss):
    def divergence(self, logp, logq):
        return -(logp.exp() * logq.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


class HasTheWrongSign(TokenLoss):
    def divergence(self, logp, logq):
        return -divergences.kl(logp, logq)


class SkipsTheFirstToken(TokenLoss):
    def divergence(self, logp, logq):
        return divergences.kl(logp[:, 1:], logq[:, 1:]).clamp_min(0)


class ReturnsAMatrix(TokenLoss):
    def divergence(self, logp, logq):
        return (logp.exp() - logq.exp()).abs()


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (IsCrossEntropy, "it must be 0 at p = q"),
        (HasTheWrongSign, "it must not be negative, got -"),
        (SkipsTheFirstToken, "a permutation of the vocabulary must not change the loss"),
    ],
)
def test_a_divergence_that_is_none_is_found(broken, promise):
    found = failures(broken())
    assert any(re.search(promise, sentence) for sentence in found), found


def test_a_divergence_of_the_wrong_shape_is_found():
    contract = TokenLossContract()
    contract.make = ReturnsAMatrix
    with pytest.raises(AssertionError, match=r"divergence must return \[n\]"):
        contract.test_is_zero_when_student_equals_teacher()


def test_the_contract_asks_for_a_loss():
    with pytest.raises(NotImplementedError, match="write make"):
        LossContract().test_units_are_known_without_a_model()


def test_importing_it_does_not_import_pytest():
    code = "import sys, distillkit.testing; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_made_batch_trains_on_the_responses_it_was_asked_for():
    batch = make_batch((2, 0, 3), ("teacher", "student", "teacher"), (4, 4, 9), vocab=50, seed=1)
    assert batch.lengths == (2, 0, 3)
    assert batch.writer == ("teacher", "student", "teacher")
    assert batch.pair == (0, 0, 1)  # pairs are numbered within the batch
    assert batch.rows.tolist() == [0, 0, 2, 2, 2]
    assert batch.targets.tolist() == batch.input_ids[batch.response_mask].tolist()
    # Each position comes right before its target.
    assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.targets)


def test_other_prompts_leave_the_responses():
    first, second = (make_rows((4, 1), ("student",) * 2, (0, 1), vocab=50, prompt_seed=seed) for seed in (0, 1))
    for one, other in zip(first, second, strict=True):
        responses = [row.input_ids[row.response_mask.index(True) :] for row in (one, other)]
        assert responses[0] == responses[1]
        assert one.input_ids != other.input_ids

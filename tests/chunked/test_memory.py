"""Letters: N response positions, D hidden width, V vocabulary."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from distillkit.chunked import memory as budget
from distillkit.chunked.memory import CPU_BLOCK, CPU_BUDGET, MIB, Budget, default_budget, peak_bytes
from distillkit.chunked.output_head import OutputHead
from distillkit.losses import (
    DPKD,
    CrossEntropy,
    DistiLLM2,
    ForwardKL,
    GeneralizedJSD,
    JeffreysKL,
    SkewKL,
    SkewReverseKL,
    TokenLoss,
)
from distillkit.testing import make_batch
from distillkit.types import Scores, Slicing

X = torch.linspace(0.1, 1.0, 1000)  # 4000 bytes
KB4 = 4000


# What is counted: everything that an operation makes and that is still alive.


def test_nothing_made_is_nothing_counted():
    assert peak_bytes(lambda: None) == 0


def test_views_and_changes_in_place_make_nothing():
    own = X.clone()
    assert peak_bytes(lambda: own.view(10, 100).T[2:4].mul_(2.0)) == 0


def test_two_that_live_at_once_count_twice():
    def run():
        first = X.exp()
        second = X.exp()
        return first, second

    assert peak_bytes(run) == 2 * KB4


def test_one_that_is_gone_counts_no_more():
    def run():
        for _ in range(5):
            made = X.exp()
            del made

    assert peak_bytes(run) == KB4


def test_a_chain_holds_two_at_a_time():
    with torch.no_grad():
        assert peak_bytes(lambda: X.exp().exp().exp().exp()) == 2 * KB4


def test_a_view_keeps_the_whole_alive():
    def run():
        return [X.exp()[:1] for _ in range(3)]

    assert peak_bytes(run) == 3 * KB4


def test_the_peak_is_counted_and_not_the_end():
    def run():
        large = torch.cat([X] * 10)
        small = large[:10].clone()
        del large
        return small.exp()

    assert peak_bytes(run) == 10 * KB4 + 40


def test_what_was_made_before_is_not_counted_also_when_it_is_freed_within():
    held = [X.clone()]

    def run():
        held.pop()
        return X.exp()

    assert peak_bytes(run) == KB4


def test_other_types_count_by_their_size():
    assert peak_bytes(lambda: X.double()) == 2 * KB4
    assert peak_bytes(lambda: X > 0.5) == KB4 // 4
    assert peak_bytes(lambda: X.bfloat16()) == KB4 // 2


def test_what_autograd_saves_is_counted():
    leaf = X.clone().requires_grad_()
    # Each exponential saves its result; without a graph a chain holds two.
    assert peak_bytes(lambda: leaf.exp().exp().exp()) == 3 * KB4

    def under_no_grad():
        with torch.no_grad():
            leaf.exp().exp().exp()

    assert peak_bytes(under_no_grad) == 2 * KB4


def test_the_backward_pass_is_counted():
    leaf = X.clone().requires_grad_()
    start = torch.ones_like(X)

    def run():
        torch.autograd.grad(leaf.exp().exp().exp(), leaf, start)

    # Three results, of which the last is held by the call, and two gradients; the second result goes after them.
    assert peak_bytes(run) == 5 * KB4


def test_a_gradient_that_is_left_behind_is_counted():
    leaf, start = X.clone().requires_grad_(), torch.ones_like(X)

    def run():
        for _ in range(3):
            (leaf * 2.0).backward(start)

    # The gradient of the first call stays; a later call holds its product, what comes of it, and that gradient.
    assert peak_bytes(run) == 3 * KB4


def test_counting_leaves_the_result_and_the_graph_alone():
    leaf, found = X.clone().requires_grad_(), []
    peak_bytes(lambda: found.append(leaf.exp().sum()))
    torch.testing.assert_close(torch.autograd.grad(found[0], leaf)[0], X.exp())
    assert peak_bytes(lambda: X.exp()) == KB4  # a second count starts from nothing


# How the budget is divided.

V, D = 4099, 16  # V is large beside D, as it is in models
FLOATS = [torch.float32] * 2


def scores_of(memory=None, vocab=V, dtype=torch.float32):
    hidden = torch.zeros(3, D, dtype=dtype)
    return Scores(hidden, nn.Linear(D, 1), vocab, slicing=Slicing(memory))


class Owner:
    """Stands for a loss."""


def test_more_memory_gives_more_positions():
    owner, found = Owner(), []
    for memory in (1, 2, 8, 64, 1024):
        own = Budget(owner, scores_of(memory), FLOATS)
        found.append((own.positions, own.block(lambda: torch.empty(V))))
    assert found == sorted(found)
    assert len({positions for positions, _ in found}) == 5
    assert found[0][1] < found[-1][1]


@pytest.mark.parametrize("num_tensors", [1, 2, 3])
@pytest.mark.parametrize("memory", [1, 7, 100, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_slices_and_blocks_together_stay_within_the_memory(memory, num_tensors, dtype):
    total = memory * MIB if memory is not None else CPU_BUDGET // (2 if dtype == torch.bfloat16 else 1)
    own = Budget(Owner(), scores_of(memory, dtype=dtype), [dtype] * num_tensors)
    slices = own.positions * num_tensors * V * dtype.itemsize
    block = own.block(lambda: [torch.empty(V, dtype=torch.float64) for _ in range(5)])
    assert slices + block * 5 * V * 8 <= total
    assert slices + 2 * own.cached * V * (8 if dtype == torch.float64 else 4) <= total
    assert slices > 0.6 * total  # it is used


def test_there_is_always_room_for_one_position():
    own = Budget(Owner(), scores_of(1, vocab=10**7), FLOATS)
    assert own.positions == own.cached == own.block(lambda: torch.empty(10**7)) == 1


def test_a_block_that_makes_nothing_is_bounded_as_well():
    own = Budget(Owner(), scores_of(64), FLOATS)
    assert own.block(lambda: None) * V * 4 <= CPU_BLOCK


def test_tensors_of_a_slice_count_by_their_own_types():
    half, mixed, single, double = (
        Budget(Owner(), scores_of(8, dtype=torch.bfloat16), tensors).positions
        for tensors in ([torch.bfloat16] * 2, [torch.bfloat16, torch.float32], FLOATS, [torch.float64] * 2)
    )
    assert half == pytest.approx(1.5 * mixed, abs=2) == pytest.approx(2 * single, abs=2)
    assert single == pytest.approx(2 * double, abs=1)


def test_a_loss_is_measured_once_for_each_vocabulary_type_and_kind_of_pass():
    owner, runs = Owner(), []

    def run():
        runs.append(torch.empty(10))

    def look(**settings):
        Budget(owner, scores_of(8, **settings), FLOATS).block(run)
        return len(runs)

    assert [look(), look(), look(vocab=5), look(vocab=5), look(dtype=torch.float64), look()] == [1, 1, 2, 2, 3, 3]
    with torch.no_grad():
        assert look() == 4
    assert look() == 4
    Budget(Owner(), scores_of(8), FLOATS).block(run)
    assert len(runs) == 5


def test_what_was_measured_goes_with_the_loss():
    owner = Owner()
    Budget(owner, scores_of(8), FLOATS).block(lambda: None)
    kept = weakref.ref(owner)
    assert owner in budget._bytes_per_position
    del owner
    gc.collect()
    assert kept() is None


def test_the_cpu_has_a_budget_of_its_own():
    assert default_budget(torch.device("cpu")) == CPU_BUDGET
    own, named = (Budget(Owner(), scores_of(memory), FLOATS).positions for memory in (None, CPU_BUDGET // MIB))
    assert own == named


# What a whole loss holds: the memory regression test.


class Stranger(TokenLoss):
    """By autograd, and wasteful."""

    def divergence(self, logp, logq):
        mixed = torch.logaddexp(logp, logq) - 0.6931
        return (logp.exp() * (logp - mixed)).sum(-1) + (logq.exp() * (logq - mixed)).sum(-1)


LOSSES = {
    "kl": ForwardKL(),
    "kl, temperature": ForwardKL(temperature=2.0, rescale=True),
    "jeffreys": JeffreysKL(),
    "jsd": GeneralizedJSD(),
    "skl": SkewKL(),
    "srkl": SkewReverseKL(),
    "by autograd": Stranger(),
    "cross-entropy": CrossEntropy(),
    "dpkd": DPKD(),
    "distillm2": DistiLLM2(),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


class Layer(nn.Module):
    """A head that is no plain linear layer, as an adapter makes it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, V, bias=False)

    def forward(self, hidden):
        return self.inner(hidden)


HEADS = {
    "linear": lambda: OutputHead(nn.Linear(D, V, bias=False), V),
    "bias and scale": lambda: OutputHead(nn.Linear(D, V), V, scale=0.5),
    "soft cap": lambda: OutputHead(nn.Linear(D, V, bias=False), V, softcap=2.0),
    "no linear layer": lambda: OutputHead(Layer(), V),
}


def step(loss, num_positions, memory, student):
    """What a run makes, as a function, and the scores' hidden states."""
    half = num_positions // 2
    batch = make_batch((half, num_positions - half), ("teacher", "student"), (0, 0), V)
    teacher = HEADS["linear"]()
    teacher.module.requires_grad_(False)
    hidden, other = torch.randn(num_positions, D, requires_grad=True), torch.randn(num_positions, D)

    def run():
        scores = Scores(hidden, student, V, slicing=Slicing(memory))
        total = loss(scores, Scores(other, teacher, V), batch).total.sum()
        if torch.is_grad_enabled():
            total.backward()

    return run


@functools.cache
def peak_of(name, num_positions, memory=1, head="linear", with_grad=True):
    """Most bytes that a loss and its backward pass hold at once, without what they are given."""
    student = HEADS[head]()
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(with_grad):
        torch.manual_seed(0)
        step(LOSSES[name], 4, memory, student)()  # the measuring of a block is no part of a step
        for own in student.parameters():
            own.grad = None
        return peak_bytes(step(LOSSES[name], num_positions, memory, student))


def per_position(name):
    """Bytes that each position takes besides: `[N, D]` tensors and numbers."""
    return D * 4 * (5 if name == "distillm2" else 1) + 40  # it takes each side's states out of both models'


def allowed(name, num_positions, memory=1):
    """The budget, what each position takes, and the gradient of the head and of a bias."""
    gradients = (D + 1) * V * 4 * (2 if name == "distillm2" else 1)  # each side is a sum of its own
    return memory * MIB + gradients + num_positions * per_position(name)


FEW = 4 * Budget(Owner(), scores_of(1), FLOATS).positions  # whole slices, so that few and many are alike
MANY = 8 * FEW


@every_loss
def test_a_loss_stays_within_its_memory_and_uses_it(name):
    assert MANY * V * 4 > 8 * MIB, "the logits must not fit"
    assert 0.6 * MIB < peak_of(name, MANY) <= allowed(name, MANY)


@pytest.mark.parametrize("name", ["kl", "by autograd"])
def test_a_loss_stays_within_a_larger_memory_and_uses_it(name):
    assert 0.6 * 4 * MIB < peak_of(name, MANY, memory=4) <= allowed(name, MANY, memory=4)


@every_loss
def test_memory_does_not_grow_with_the_number_of_positions(name):
    few, many = peak_of(name, FEW), peak_of(name, MANY)
    assert many - few <= (MANY - FEW) * per_position(name)
    states = D * 4 * (2 if name == "distillm2" else 1)  # [N, D] while a slice is worked on
    assert many - MANY * states == pytest.approx(few - FEW * states, rel=0.05)


@every_loss
def test_without_a_gradient_a_loss_stays_within_its_memory(name):
    few, many = (peak_of(name, number, with_grad=False) for number in (FEW, MANY))
    assert many <= allowed(name, MANY)
    assert many - few <= (MANY - FEW) * per_position(name)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "linear"])
@pytest.mark.parametrize("name", ["skl", "by autograd", "cross-entropy"])
def test_a_loss_stays_within_its_memory_with_other_heads(name, head):
    assert peak_of(name, MANY, head=head) <= allowed(name, MANY)


@pytest.mark.parametrize("name", ["dpkd", "distillm2", "kl"])
def test_a_teachers_scores_are_sliced_as_the_students(name):
    # The teacher's own setting is a default that no user sees: all its positions would fit.
    assert default_budget(torch.device("cpu")) > 4 * MANY * V * 4
    assert peak_of(name, MANY) < MANY * V * 4 / 4

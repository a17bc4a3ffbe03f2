"""Losses in slices under a device's budget are those of one piece in float64.

Letters: N response positions, n of a slice, D hidden width, V vocabulary.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distillkit import losses, registry
from distillkit.chunked import accumulate as sums
from distillkit.chunked import memory as budget
from distillkit.chunked.accumulate import ChunkedAccumulator
from distillkit.chunked.evaluate import slices
from distillkit.chunked.output_head import HeadPass, OutputHead
from distillkit.interfaces import Loss
from distillkit.losses import ForwardKL
from distillkit.testing import make_batch
from distillkit.types import Scores, Slicing
from gpu.small import needs_cuda
from helpers.one_piece import (
    BATCH,
    LOSSES,
    MODELS,
    STUDENT,
    TEACHER,
    Model,
    V,
    Whole,
    assert_same,
    by_loss,
    in_one_piece,
    sum_of_losses,
    value_and_gradients,
)

pytestmark = pytest.mark.gpu


BUILT_IN = {
    name: sum_of_losses() if name == "WeightedSum" else getattr(losses, name)()
    for name in sorted(entry.name for entry in registry.entries("loss") if entry.distribution == "distillkit")
} | {name: LOSSES[name] for name in ("DistiLLM2, adapted", "by autograd", "ForwardKL, token_mean, temperature")}
every_loss = pytest.mark.parametrize("loss", BUILT_IN.values(), ids=BUILT_IN)
MODELS_USED = ("tied", "soft cap", "wide")


def test_every_loss_of_the_package_is_compared() -> None:
    assert len(BUILT_IN) == 14


def on(device: torch.device, loss: Loss) -> Loss:
    return copy.deepcopy(loss).to(device)


@every_loss
@pytest.mark.parametrize("settings", [MODELS[name] for name in MODELS_USED], ids=MODELS_USED)
def test_in_float32_value_and_gradients_are_close_to_those_of_one_piece_in_float64(
    loss: Loss, settings: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MIB", 1)  # `memory` is bytes: room for one position, for a few, for all
    expected = in_one_piece(loss, Model(STUDENT, **settings), Model(TEACHER, **settings), BATCH)
    student, teacher = (Model(seed, **settings).float().to(device) for seed in (STUDENT, TEACHER))
    for memory in (1, 2000, None):
        actual = by_loss(on(device, loss), student, teacher, BATCH.to(device), memory)
        assert {tensor.dtype for tensor in actual[1:]} == {torch.float32}
        assert {tensor.device for tensor in actual} == {device}
        # As on the CPU: 1e-5 of the largest entry, and the value is what is left of 1.
        assert_same([tensor.cpu() for tensor in actual], expected, 1e-5, floor=1e-5)


@every_loss
def test_in_bfloat16_value_and_gradients_are_those_of_one_piece_to_two_digits(
    loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # States and weights are bfloat16, the reference is float64 on the same numbers: 8 bits of logits of up to 4.
    monkeypatch.setattr(budget, "MIB", 1)
    head = Model(STUDENT, tied=False, bias=True, softcap=4.0).head.bfloat16()
    hidden = Model(STUDENT).hidden(BATCH).detach().bfloat16()
    teacher = Model(TEACHER, tied=False)
    wide, leaf = copy.deepcopy(head).double(), hidden.double().requires_grad_()
    whole = Whole(BATCH, 4 * torch.tanh(wide(leaf) / 4), teacher.logits(BATCH).detach())
    expected = value_and_gradients(whole.of(loss), [leaf, *wide.parameters()])
    head, hidden, batch = head.to(device), hidden.to(device).requires_grad_(), BATCH.to(device)
    teacher = teacher.float().to(device)
    for memory in (1, 2000, None):
        scores = Scores(hidden, OutputHead(head, V, softcap=4.0), V, slicing=Slicing(memory))
        objective = on(device, loss)
        total = objective(scores, teacher.scores(batch) if objective.needs_teacher else None, batch).total
        actual = value_and_gradients(total, [hidden, *head.parameters()])
        assert {one.dtype for one in actual[1:]} == {torch.bfloat16}
        assert_same([one.cpu() for one in actual], expected, 1.5e-2)


WIDE, WIDTH = 20_000, 64
"""V past two chunks of a device's sum, and D."""


def wide_scores(device: torch.device, dtype: torch.dtype, memory: int | None, seed: int) -> Scores:
    """Scores of 400 positions over the wide vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, WIDE, bias=False)
    head.weight.data = 0.3 * torch.randn(WIDE, WIDTH, generator=generator)
    hidden = torch.randn(400, WIDTH, generator=generator)
    hidden = hidden.to(device, dtype).requires_grad_()
    return Scores(hidden, OutputHead(head.to(device, dtype), WIDE), WIDE, slicing=Slicing(memory))


def value_of(student: Scores, teacher: Scores, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Forward KL in one piece, and its gradients, on the CPU in `dtype`."""
    logits = []
    leaves = []
    for scores in (student, teacher):
        hidden, weight = (tensor.detach().cpu().to(dtype) for tensor in (scores.hidden, scores.head.module.weight))
        leaves.append([hidden.requires_grad_(), weight.requires_grad_()])
        logits.append(hidden @ weight.T)
    logq, logp = logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
    total = (logp.exp() * (logp - logq)).sum(-1).reshape(-1, 20).mean(-1).sum()
    return value_and_gradients(total, leaves[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 3e-2),  # measured 1.5e-2 where the products are in bfloat16 too
        # 11 bits; the gradient by most logits is below the smallest normal number of float16. Measured: 2e-3.
        pytest.param(torch.float16, 6e-3, marks=needs_cuda),
    ],
    ids=str,
)
def test_a_wide_vocabulary_in_a_small_budget_gives_what_one_piece_gives(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    batch = make_batch((20,) * 20, ("teacher",) * 20, tuple(range(20)), WIDE).to(device)
    student, teacher = (wide_scores(device, dtype, 8, seed) for seed in (1, 2))
    expected = value_of(student, teacher, torch.float64)
    total = ForwardKL()(student, teacher, batch).total
    actual = value_and_gradients(total, [student.hidden, student.head.module.weight])
    for ours, theirs in zip(actual, expected, strict=True):
        ours, theirs = ours.double().cpu(), theirs.double()
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_the_gradient_of_a_head_in_bfloat16_is_summed_with_more_bits_than_it_has(device: torch.device) -> None:
    # 100 slices: a sum in bfloat16 would lose all that is below 2^-8 of it.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDE, WIDTH, generator=generator).bfloat16()
    hidden = torch.randn(500, WIDTH, generator=generator).abs().bfloat16()
    by_logits = torch.rand(500, 32, generator=generator).repeat(1, WIDE // 32)  # [N, V], all of one sign
    head = nn.Linear(WIDTH, WIDE, bias=False, dtype=torch.bfloat16).to(device)
    head.weight.data.copy_(weight)
    states = hidden.to(device)
    run = HeadPass(OutputHead(head, WIDE), states)
    run.start()
    if device.type == "cuda":
        assert isinstance(run._sums[0], ChunkedAccumulator)
        assert sums.rows_at_once(device) < WIDE
    for part in slices(500, 5):
        logits = torch.empty(part.stop - part.start, WIDE, dtype=run.stored, device=device)
        run.logits(states[part], logits, with_grad=True)
        run.backward(by_logits[part].to(device))
    (gradient,) = run.finished()
    assert gradient.dtype == torch.bfloat16
    expected = by_logits.bfloat16().double().T @ hidden.double()
    rounded = (expected.bfloat16().double() - expected).norm()
    # The last rounding is what is left, besides that of each slice's product, which averages out over the slices.
    assert (gradient.double().cpu() - expected).norm() < 1.2 * rounded


def test_a_device_has_a_budget_of_its_own(device: torch.device) -> None:
    share = budget.default_budget(device)
    if device.type == "cpu":
        assert share == budget.CPU_BUDGET
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        assert share == min(total // 32, 2048 * budget.MIB)


def test_a_compiled_loss_is_the_loss(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("takes a C++ compiler, and is tested with the losses")
    batch = make_batch((20,) * 20, ("teacher",) * 20, tuple(range(20)), WIDE).to(device)
    student, teacher = (wide_scores(device, torch.float32, 8, seed) for seed in (1, 2))
    expected = value_and_gradients(ForwardKL()(student, teacher, batch).total, [student.hidden])
    compiled = Scores(student.hidden, student.head, WIDE, slicing=Slicing(8, compile=True))
    actual = value_and_gradients(ForwardKL()(compiled, teacher, batch).total, [student.hidden])
    assert_same(actual, expected, 1e-5)

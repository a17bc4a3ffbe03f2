"""Packed rows through flex attention give what padded rows give through the model's own attention.

Letters: L tokens of packed rows, d head width.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from distillkit.models import packing
from distillkit.models.scoring import packs, score
from distillkit.types import Batch
from gpu.small import ON_CPU, VOCAB, assert_near, distance, needs_cuda, packed_batch, qwen2

pytestmark = pytest.mark.gpu

WINDOW = 5
LENGTHS = (150, 300, 200, 700, 450)
"""More than a block of 128, in one process one after another."""

# Products of float32 in another order: at most 700 keys, 2 layers. A mask that is off by one token gives 1e-2 and more.
SINGLE = 2e-4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each packed batch for which flex attention is called."""
    lengths: list[int] = []
    attend = packing._flex

    def counting(query: torch.Tensor, *args: Any) -> Any:
        lengths.append(query.shape[2])
        return attend(query, *args)

    monkeypatch.setattr(packing, "_flex", counting)
    return lengths


def states_and_gradients(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states, and the gradient of each parameter of the body by a fixed weighting of them."""
    model.zero_grad()
    hidden = score(model, batch, VOCAB).hidden
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    (hidden * weights).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return hidden.detach(), gradients


def padded(batch: Batch) -> Batch:
    return replace(batch, packed=None)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_states_and_gradients_are_those_of_padded_rows_at_every_length(
    window: int | None, device: torch.device, calls: list[int]
) -> None:
    model = qwen2(window=window).to(device)
    reference = copy.deepcopy(model)  # never packed: transformers' own attention
    assert packs(model)
    calls.clear()
    for seed, length in enumerate(LENGTHS):
        batch = packed_batch(length, seed).to(device)
        assert any(last > first for _, _, first, last in batch.packed.segments), "some rows share a prompt"
        expected = states_and_gradients(reference, padded(batch))
        actual = states_and_gradients(model, batch)
        assert_near([actual[0], *actual[1]], [expected[0], *expected[1]], SINGLE)
    assert ON_CPU or len(calls) == 2 * len(LENGTHS), "once a layer"


def test_in_bfloat16_packed_rows_are_as_near_to_float32_as_padded_ones(device: torch.device, calls: list[int]) -> None:
    wide = qwen2(window=WINDOW).bfloat16().float().to(device)
    model = copy.deepcopy(wide).bfloat16()
    reference = copy.deepcopy(model)
    assert packs(model)
    for seed, length in enumerate((150, 400)):
        batch = packed_batch(length, seed).to(device)
        exact = states_and_gradients(wide, padded(batch))
        by_padded, by_packed = states_and_gradients(reference, padded(batch)), states_and_gradients(model, batch)
        for part in (slice(0, 1), slice(1, None)):
            expected = [exact[0], *exact[1]][part]
            rounding = distance([by_padded[0], *by_padded[1]][part], expected)
            assert 1e-4 < rounding < 0.1, "8 bits"
            assert distance([by_packed[0], *by_packed[1]][part], expected) < 1.5 * rounding
    assert ON_CPU or calls


def test_under_autocast_packed_rows_are_as_near_to_float32_as_padded_ones(
    device: torch.device, calls: list[int]
) -> None:
    # Under autocast rotary embeddings leave queries and keys in float32, while values are bfloat16.
    model = qwen2().to(device)
    reference = copy.deepcopy(model)
    batch = packed_batch(200).to(device)
    exact = states_and_gradients(reference, padded(batch))
    with torch.autocast(device.type, torch.bfloat16):
        assert packs(model)
        calls.clear()
        by_padded, by_packed = states_and_gradients(reference, padded(batch)), states_and_gradients(model, batch)
    for part in (slice(0, 1), slice(1, None)):
        expected = [exact[0], *exact[1]][part]
        rounding = distance([by_padded[0], *by_padded[1]][part], expected)
        assert 1e-4 < rounding < 0.1
        assert distance([by_packed[0], *by_packed[1]][part], expected) < 1.5 * rounding
    assert ON_CPU or len(calls) == 2


@pytest.mark.parametrize("length", [30, 90])
def test_a_batch_shorter_than_a_block_may_be_the_first_that_is_trained_on(
    length: int, device: torch.device, calls: list[int]
) -> None:
    # Below 128 queries inductor takes another kernel, whose blocks hold the queries of all heads of a group.
    model = qwen2().to(device)
    reference = copy.deepcopy(model)
    batch = packed_batch(length).to(device)
    assert batch.packed.input_ids.shape[1] < 128
    assert packs(model)
    expected, actual = states_and_gradients(reference, padded(batch)), states_and_gradients(model, batch)
    assert_near([actual[0], *actual[1]], [expected[0], *expected[1]], SINGLE)
    assert ON_CPU or calls


@needs_cuda
def test_more_lengths_need_no_more_kernels(device: torch.device) -> None:
    model = qwen2().to(device)
    assert packs(model)
    graphs = []
    for seed, length in enumerate((*LENGTHS, 260, 1000)):
        batch = packed_batch(length, seed).to(device)
        assert batch.packed.input_ids.shape[1] % 128, "whole blocks have a kernel without bounds"
        states_and_gradients(model, batch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


@needs_cuda
def test_two_models_with_and_without_windows_stay_below_the_limit_of_recompilations(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Past the limit torch runs flex attention without a kernel: all scores `[H, L, L]` are then in memory. No kernel
    # is made in this test: dynamo alone decides how many there would be.
    compiled = torch.compile(packing.flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(packing, "_compiled", [compiled])
    student, teacher = qwen2(window=WINDOW).to(device), qwen2(layers=3, seed=1, window=WINDOW).to(device)
    teacher = _with_wider_heads(teacher).to(device)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in (torch.enable_grad, torch.inference_mode):  # a step, then validation
            for length in (300, 200):
                batch = packed_batch(length, seed=length).to(device)
                with torch.no_grad():
                    score(teacher, batch, VOCAB)
                with mode():
                    score(student, batch, VOCAB)
                    if mode is torch.inference_mode:
                        score(teacher, batch, VOCAB)


def _with_wider_heads(model: Any) -> Any:
    """Another model with heads twice as wide, as a larger one of a family has them."""
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return type(model)(config).eval()

"""Letters: n positions of a slice, D hidden width, V vocabulary."""

import pytest
import torch

from distillkit.chunked import accumulate
from distillkit.chunked.accumulate import (
    ChunkedAccumulator,
    GradientAccumulator,
    SplitAccumulator,
    cut,
    make_accumulator,
)

V, D = 37, 5
KINDS = {"whole": GradientAccumulator, "chunked": ChunkedAccumulator, "split": SplitAccumulator}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=[(4, 3), (8, 16), (1000, 1000)], autouse=True)
def sizes(request, monkeypatch):
    """Chunks and tiles that do and don't divide the rows."""
    rows, tile = request.param
    monkeypatch.setitem(accumulate.ROWS, "cpu", rows)
    monkeypatch.setattr(accumulate, "_TILE", tile)


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_additions_reach_the_sum(kind):
    total, expected = KINDS[kind](torch.zeros(V, D, dtype=torch.bfloat16)), torch.zeros(V, D, dtype=torch.float64)
    for step in range(300):
        more = random(V, D, seed=step).abs() if step % 3 else -random(V, D, seed=step).abs()
        for rows in (slice(0, 11), slice(11, 12), slice(12, V)):
            total.add(rows, more[rows])
        expected += more.double()
    found = total.finished()
    assert found.dtype == torch.bfloat16
    # The last rounding is all that is seen: 2^-9 at most of each, 1.6e-3 measured for the rounded float64 sum itself.
    rounded = expected.to(torch.bfloat16)
    assert relative(found, expected) <= 1.02 * relative(rounded, expected)
    assert float((found != rounded).double().mean()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_slices_are_added_to_their_rows(kind):
    total, expected = KINDS[kind](torch.zeros(V, D, dtype=torch.bfloat16)), torch.zeros(V, D, dtype=torch.float64)
    for step in range(50):
        by_logits, hidden = random(7, V, seed=step), random(7, D, seed=1000 + step)
        for rows in (slice(0, 11), slice(11, 30)):
            total.add_product(rows, by_logits[:, rows], hidden)
            expected[rows] += by_logits[:, rows].double().T @ hidden.double()
    found = total.finished()
    assert not found[30:].any()
    assert relative(found, expected) < 2**-9


def test_a_split_sum_carries_into_the_exponent_and_over_zero():
    steps = [0.999, 0.001, 1e-4, -1.0001, 5e-5, -3.0, 3.0, 2.0**100, -(2.0**100), 1e-30]
    total, exact, rounding = SplitAccumulator(torch.zeros(1, 1, dtype=torch.bfloat16)), torch.zeros(()), 0.0
    for step in steps:
        total.add(slice(0, 1), torch.full((1, 1), step))
        exact += step
        rounding += 2**-16 * abs(exact.item())
        bits = total.upper.view(torch.int16).to(torch.int32) * 2**16 + total.lower.to(torch.int32) * 2**8
        assert bits.view(torch.float32).item() == pytest.approx(exact.item(), rel=0, abs=rounding)


def test_a_split_sum_keeps_what_is_not_finite():
    total = SplitAccumulator(torch.zeros(3, 1, dtype=torch.bfloat16))
    total.add(slice(0, 3), torch.tensor([[torch.inf], [-torch.inf], [torch.nan]]))
    total.add(slice(0, 3), torch.ones(3, 1))
    found = total.finished().flatten().tolist()
    assert found[:2] == [float("inf"), float("-inf")]
    assert found[2] != found[2]


def test_a_split_sum_takes_a_byte_for_each_weight_beyond_the_gradient():
    own = torch.zeros(V, D, dtype=torch.bfloat16)
    total = SplitAccumulator(own)
    held = [value for value in vars(total).values() if isinstance(value, torch.Tensor) and value is not own]
    assert sum(value.nbytes for value in held) == own.nbytes + V * D
    upper = total.upper
    assert total.finished() is upper


@pytest.mark.parametrize(
    ("dtype", "shape", "kind"),
    [
        (torch.float32, (V, D), GradientAccumulator),
        (torch.float64, (V, D), GradientAccumulator),
        (torch.bfloat16, (V,), GradientAccumulator),
        (torch.bfloat16, (V, D), SplitAccumulator),
        (torch.float16, (V, D), ChunkedAccumulator),
    ],
)
def test_the_kind_goes_by_type_and_shape(dtype, shape, kind):
    own = torch.zeros(shape, dtype=dtype)
    assert type(make_accumulator(own)) is kind
    assert make_accumulator(own).finished().dtype == dtype


def test_a_cut_covers_the_length():
    assert cut(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert cut(0, 3) == []

"""Letters: N positions, V vocabulary."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from distillkit import divergences
from distillkit.types import log_softmax

N, V = 12, 33
ALPHA, BETA, WEIGHT = 0.1, 0.3, 0.25


def mixture(p, q, share):
    return share * p + (1 - share) * q


# From probabilities in float64, by scipy's elementwise relative entropy.
ORACLES = {
    "kl": lambda p, q: rel_entr(p, q).sum(-1),
    "rkl": lambda p, q: rel_entr(q, p).sum(-1),
    "jeffreys": lambda p, q: (1 - WEIGHT) * rel_entr(p, q).sum(-1) + WEIGHT * rel_entr(q, p).sum(-1),
    "jsd": lambda p, q: (
        BETA * rel_entr(p, mixture(p, q, BETA)).sum(-1) + (1 - BETA) * rel_entr(q, mixture(p, q, BETA)).sum(-1)
    ),
    "tvd": lambda p, q: np.maximum(p - q, 0).sum(-1),  # half the L1 norm: what p has more is what q has less
    "skl": lambda p, q: rel_entr(p, mixture(p, q, ALPHA)).sum(-1),
    "srkl": lambda p, q: rel_entr(q, mixture(q, p, ALPHA)).sum(-1),
    "overlap": lambda p, q: np.minimum(p, q).sum(-1),
}
FUNCTIONS = {
    "kl": divergences.kl,
    "rkl": divergences.rkl,
    "jeffreys": lambda logp, logq: divergences.jeffreys(logp, logq, WEIGHT),
    "jsd": lambda logp, logq: divergences.jsd(logp, logq, BETA),
    "tvd": divergences.tvd,
    "skl": lambda logp, logq: divergences.skl(logp, logq, ALPHA),
    "srkl": lambda logp, logq: divergences.srkl(logp, logq, ALPHA),
    "overlap": divergences.overlap,
}
NAMES = sorted(FUNCTIONS)
MASKS = ("none", "both sides", "teacher only", "student only")


def logits(kind="random", mask="none", seed=0):
    """Teacher's and student's logits [N, V] in float64: `peaked` ones have most of the mass on a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"random": 1.0, "peaked": 8.0}[kind]
    p, q = (scale * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    excluded = torch.rand(N, V, generator=generator) < 0.3
    excluded[:, 0] = False  # a distribution needs a token
    if mask in ("both sides", "teacher only"):
        p = p.masked_fill(excluded, -math.inf)
    if mask in ("both sides", "student only"):
        q = q.masked_fill(excluded, -math.inf)
    return p, q


def test_every_divergence_has_an_oracle():
    public = {name for name in divergences.__all__ if not name.endswith("_and_grad")}
    assert public - {"log_mixture"} == set(ORACLES) == set(FUNCTIONS)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_scipy_in_float64(name, kind, mask):
    p, q = logits(kind, mask)
    expected = ORACLES[name](softmax(p.numpy(), axis=-1), softmax(q.numpy(), axis=-1))
    value = FUNCTIONS[name](log_softmax(p), log_softmax(q))
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)


# Relative error measured over 20 seeds, all divergences and masks; where p and q peak on the same token, what is left
# of their difference carries float32's rounding of a log-softmax (epsilon 1.2e-7, logits up to 30).
@pytest.mark.parametrize(("kind", "tolerance"), [("random", 2e-6), ("peaked", 6e-5)])  # measured: 9.8e-7 and 2.9e-5
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_scipy_to_float32_precision_for_float32_logits(name, mask, kind, tolerance):
    p, q = (side.float() for side in logits(kind, mask))
    expected = ORACLES[name](softmax(p.double().numpy(), axis=-1), softmax(q.double().numpy(), axis=-1))
    value = FUNCTIONS[name](log_softmax(p), log_softmax(q))
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), expected, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "mask"),
    [("kl", "student only"), ("rkl", "teacher only"), ("jeffreys", "teacher only"), ("jeffreys", "student only")],
)
def test_is_infinite_where_the_definition_is(name, mask):
    p, q = logits(mask=mask)
    assert FUNCTIONS[name](log_softmax(p), log_softmax(q)).isposinf().all()


@pytest.mark.parametrize(("function", "mask"), [("skl", "student only"), ("srkl", "teacher only")])
@pytest.mark.parametrize("alpha", [0.0, torch.zeros(N)])
def test_a_skew_of_zero_is_infinite_where_the_plain_divergence_is(function, mask, alpha):
    p, q = logits(mask=mask)
    assert getattr(divergences, function)(log_softmax(p), log_softmax(q), alpha).isposinf().all()


# Rows of logits at which float32, and float64 as well, underflow or overflow when they leave log space.
EXTREME_P = [[0.0, -130.0, -1e4, -math.inf], [1e4, 0.0, -1e4, -math.inf], [0.5, 0.25, -130.0, -math.inf]]
EXTREME_Q = [[-130.0, 0.0, -1e4, -math.inf], [0.0, 9990.0, -1e4, -math.inf], [0.25, -130.0, 0.5, -math.inf]]


def decimal_probabilities(row):
    """Softmax in 60 digits, whose exponents reach far below the smallest float."""
    weights = [Decimal(0) if value == -math.inf else Decimal(value).exp() for value in row]
    return [weight / sum(weights) for weight in weights]


def decimal_kl(first, second):
    return sum((a * (a / b).ln() for a, b in zip(first, second, strict=True) if a), Decimal(0))


def decimal_mixture(first, second, share):
    return [Decimal(share) * a + (1 - Decimal(share)) * b for a, b in zip(first, second, strict=True)]


DECIMAL_ORACLES = {
    "kl": decimal_kl,
    "rkl": lambda p, q: decimal_kl(q, p),
    "jeffreys": lambda p, q: (1 - Decimal(WEIGHT)) * decimal_kl(p, q) + Decimal(WEIGHT) * decimal_kl(q, p),
    "jsd": lambda p, q: (
        Decimal(BETA) * decimal_kl(p, decimal_mixture(p, q, BETA))
        + (1 - Decimal(BETA)) * decimal_kl(q, decimal_mixture(p, q, BETA))
    ),
    "tvd": lambda p, q: sum((max(a - b, Decimal(0)) for a, b in zip(p, q, strict=True)), Decimal(0)),
    "skl": lambda p, q: decimal_kl(p, decimal_mixture(p, q, ALPHA)),
    "srkl": lambda p, q: decimal_kl(q, decimal_mixture(q, p, ALPHA)),
    "overlap": lambda p, q: sum((min(a, b) for a, b in zip(p, q, strict=True)), Decimal(0)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_sixty_digit_arithmetic_where_probabilities_underflow(name, dtype, tolerance):
    with localcontext(prec=60):
        pairs = [[decimal_probabilities(row) for row in rows] for rows in zip(EXTREME_P, EXTREME_Q, strict=True)]
        expected = [float(DECIMAL_ORACLES[name](p, q)) for p, q in pairs]
    p, q = (torch.tensor(rows, dtype=dtype) for rows in (EXTREME_P, EXTREME_Q))
    value = FUNCTIONS[name](log_softmax(p), log_softmax(q))
    np.testing.assert_allclose(value.numpy(), expected, rtol=tolerance, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_finite_on_extreme_logits(name, dtype):
    teacher, student = (torch.tensor(rows, dtype=dtype) for rows in (EXTREME_P, EXTREME_Q))
    student.requires_grad_()
    value = FUNCTIONS[name](log_softmax(teacher), log_softmax(student))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name):
    teacher, student = (side[:3, :7].clone().requires_grad_() for side in logits(seed=1))
    assert torch.autograd.gradcheck(lambda p, q: FUNCTIONS[name](log_softmax(p), log_softmax(q)), (teacher, student))


@pytest.mark.parametrize("mask", ["none", "both sides"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"overlap"}))
def test_is_zero_when_student_equals_teacher(name, mask):
    for kind in ("random", "peaked"):
        logp = log_softmax(logits(kind, mask)[0])
        assert FUNCTIONS[name](logp, logp.clone()).abs().max() < 1e-14


def test_overlap_is_one_minus_total_variation():
    logp, logq = (log_softmax(side) for side in logits("peaked", "both sides"))
    torch.testing.assert_close(divergences.tvd(logp, logq) + divergences.overlap(logp, logq), torch.ones(N).double())


@pytest.mark.parametrize("alpha", [0, 0.0, torch.zeros(N)])
@pytest.mark.parametrize(("skewed", "plain"), [("skl", "kl"), ("srkl", "rkl")])
def test_a_skew_of_zero_is_the_plain_divergence_exactly(skewed, plain, alpha):
    for dtype in (torch.float32, torch.float64):
        logp, logq = (log_softmax(side.to(dtype)) for side in logits("peaked"))
        assert torch.equal(getattr(divergences, skewed)(logp, logq, alpha), FUNCTIONS[plain](logp, logq))


def test_jeffreys_at_its_ends_is_kl_and_rkl_exactly():
    logp, logq = (log_softmax(side) for side in logits())
    assert torch.equal(divergences.jeffreys(logp, logq, 0.0), divergences.kl(logp, logq))
    assert torch.equal(divergences.jeffreys(logp, logq, 1.0), divergences.rkl(logp, logq))


@pytest.mark.parametrize("name", ["skl", "srkl"])
def test_a_skew_per_position_equals_a_call_for_each_position(name):
    function = getattr(divergences, name)
    logp, logq = (log_softmax(side) for side in logits(mask="both sides"))
    alphas = torch.linspace(0.0, 0.9, N, dtype=torch.float64)
    values = function(logp, logq, alphas)
    for row, alpha in enumerate(alphas.tolist()):
        one = function(logp[row : row + 1], logq[row : row + 1], alpha)
        torch.testing.assert_close(values[row : row + 1], one, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["skl", "srkl"])
def test_a_skew_carries_no_gradient(name):
    alpha = torch.full((N,), 0.1, dtype=torch.float64, requires_grad=True)
    logp, logq = (log_softmax(side).requires_grad_() for side in logits())
    value = getattr(divergences, name)(logp, logq, alpha).sum()
    assert torch.autograd.grad(value, alpha, allow_unused=True) == (None,)


def test_a_detached_mixture_changes_the_gradient_and_not_the_value():
    logp, q = log_softmax(logits()[0]), logits()[1].requires_grad_()
    values = [divergences.srkl(logp, log_softmax(q), ALPHA, detach_mixture=detach) for detach in (False, True)]
    assert torch.equal(*values)
    grads = [torch.autograd.grad(value.sum(), q)[0] for value in values]
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_the_gradient_with_a_detached_mixture_is_that_of_a_frozen_mixture():
    p, q = (side[:4, :9].clone() for side in logits(seed=2))
    q.requires_grad_()
    value = divergences.srkl(log_softmax(p), log_softmax(q), ALPHA, detach_mixture=True)
    (grad,) = torch.autograd.grad(value.sum(), q)

    start = q.detach().numpy()
    frozen = ALPHA * softmax(start, axis=-1) + (1 - ALPHA) * softmax(p.numpy(), axis=-1)
    expected, step = np.zeros_like(start), 1e-5
    for place in np.ndindex(*start.shape):
        moved = [start.copy(), start.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (rel_entr(softmax(side, axis=-1), frozen).sum() for side in moved)
        expected[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(grad.numpy(), expected, atol=1e-9)


def test_jsd_tends_to_kl_and_rkl_at_its_ends():
    logp, logq = (log_softmax(side) for side in logits())
    near = 1e-6  # the next term is of this order
    torch.testing.assert_close(divergences.jsd(logp, logq, near) / near, divergences.kl(logp, logq), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        divergences.jsd(logp, logq, 1 - near) / near, divergences.rkl(logp, logq), rtol=1e-4, atol=0
    )


def test_bounds_are_reached_by_distributions_without_a_common_token():
    logp, logq = (torch.tensor([row]).log() for row in ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75]))
    assert divergences.tvd(logp, logq).item() == 1.0
    assert divergences.overlap(logp, logq).item() == 0.0
    assert divergences.jsd(logp, logq).item() == pytest.approx(math.log(2))
    assert divergences.skl(logp, logq, 0.1).item() == pytest.approx(-math.log(0.1))
    assert divergences.srkl(logp, logq, 0.1).item() == pytest.approx(-math.log(0.1))


@pytest.mark.parametrize("share", [0.2, torch.full((N,), 0.2), torch.linspace(0, 1, N)])
def test_a_mixture_is_that_of_the_probabilities(share):
    first, second = (softmax(side.numpy(), axis=-1) for side in logits("peaked", "both sides"))
    weight = share.double().numpy()[:, None] if isinstance(share, torch.Tensor) else share
    mixed = divergences.log_mixture(*(log_softmax(side) for side in logits("peaked", "both sides")), share)
    assert torch.equal(mixed.isneginf(), torch.tensor(mixture(first, second, weight)) == 0)
    np.testing.assert_allclose(mixed.exp().numpy(), mixture(first, second, weight), rtol=1e-7)  # the share is float32

import functools
import math
from dataclasses import replace

import pytest
import torch

from distillkit.errors import ConfigError, PluginError
from distillkit.losses import (
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    JeffreysKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TokenLoss,
    TotalVariation,
)
from distillkit.testing import make_batch
from distillkit.types import Scores, Slicing

# Two tokens: |p − q| of the first is the total variation distance. Rows of 3, 0 and 1 positions.
P_FIRST = [0.50, 0.25, 0.75, 0.125]
Q_FIRST = [0.25, 0.50, 0.25, 0.625]
#          0.25  0.25  0.50  0.50    row means 1/3, none, 1/2
BATCH = make_batch((3, 0, 1), ("teacher",) * 3, (0, 1, 2), vocab=2)
BATCH_OF_FIVE = make_batch((3, 0, 1), ("teacher",) * 3, (0, 1, 2), vocab=5)


def scores(first):
    """Scores of two tokens, the first of which has the given probabilities."""
    first = torch.tensor(first, dtype=torch.float64)
    return Scores.from_logits(torch.stack([first, 1 - first], dim=-1).log())


def test_sequence_mean_is_the_mean_over_positions_then_over_responses():
    output = TotalVariation()(scores(Q_FIRST), scores(P_FIRST), BATCH)
    assert output.total.item() == pytest.approx(1 / 3 + 1 / 2)
    assert output.units.item() == 2  # the row without positions is no unit
    assert output.metrics["divergence"].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5])


def test_token_mean_is_the_mean_over_all_positions():
    output = TotalVariation(reduction="token_mean")(scores(Q_FIRST), scores(P_FIRST), BATCH)
    assert output.total.item() == pytest.approx(1.5)
    assert output.units.item() == 4


def test_sequence_mean_is_the_default():
    assert TotalVariation().reduction == CrossEntropy().reduction == "sequence_mean"


@pytest.mark.parametrize(("reduction", "units"), [("sequence_mean", 2.0), ("token_mean", 4.0)])
def test_units_need_no_scores(reduction, units):
    counted = ForwardKL(reduction=reduction).units(BATCH)
    assert counted.dtype == torch.float64
    assert counted.item() == units


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_a_batch_without_positions_is_zero_with_a_graph(reduction):
    batch = make_batch((0, 0), ("teacher", "student"), (0, 0), vocab=4)
    weight = torch.randn(4, 3, requires_grad=True)
    hidden = weight[batch.positions]
    output = ForwardKL(reduction=reduction)(Scores.from_logits(hidden), Scores.from_logits(hidden.detach()), batch)
    output.total.backward()
    assert output.total.item() == output.units.item() == 0
    assert weight.grad.eq(0).all()
    assert output.metrics["divergence"].shape == (0,)


def test_temperature_divides_the_logits_of_both_models():
    # At temperature 1/2 the odds are squared: p goes from (1/4, 3/4) to (1/10, 9/10), q from (1/2, 1/2) to itself.
    batch = make_batch((1,), ("teacher",), (0,), vocab=2)
    output = TotalVariation(temperature=0.5)(scores([0.5]), scores([0.25]), batch)
    assert output.total.item() == pytest.approx(0.4)


def test_rescale_multiplies_by_the_temperature_squared():
    plain, rescaled = (TotalVariation(temperature=3.0, rescale=rescale) for rescale in (False, True))
    totals = [loss(scores(Q_FIRST), scores(P_FIRST), BATCH).total.item() for loss in (plain, rescaled)]
    assert totals[1] == pytest.approx(9 * totals[0])
    assert TotalVariation(rescale=True)(scores(Q_FIRST), scores(P_FIRST), BATCH).total.item() == pytest.approx(5 / 6)


def test_hinton_gradient_does_not_fade_with_the_temperature():
    # τ²·KL at high τ tends to half the squared distance of the centred logits over V, whose gradient is (q − p)/V.
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    batch = make_batch((1,), ("teacher",), (0,), vocab=5)
    loss = ForwardKL(temperature=1e4, rescale=True)
    loss(Scores.from_logits(student), Scores.from_logits(teacher), batch).total.backward()
    distance = (student - student.mean() - teacher + teacher.mean()).detach()
    torch.testing.assert_close(student.grad, distance / 5, rtol=1e-3, atol=1e-5)


# The value at one position with p = (1/4, 3/4) and q = (1/2, 1/2), from logarithms by hand; L2 = log 2 and so on.
L2, L3, L5, L7, L11 = (math.log(number) for number in (2, 3, 5, 7, 11))
KL = 0.75 * L3 - L2  # 1/4 log 1/2 + 3/4 log 3/2
RKL = L2 - 0.5 * L3  # 1/2 log 2 + 1/2 log 2/3
BY_HAND = [
    (ForwardKL(), KL),
    (ReverseKL(), RKL),
    (JeffreysKL(weight=0.25), 0.75 * KL + 0.25 * RKL),
    (JeffreysKL(weight=0.0), KL),
    (JeffreysKL(weight=1.0), RKL),
    (TotalVariation(), 0.25),
    # m = (3/8, 5/8): KL(p‖m) = 1/4 log 2/3 + 3/4 log 6/5, KL(q‖m) = 1/2 log 4/3 + 1/2 log 4/5
    (GeneralizedJSD(), (0.25 * (L2 - L3) + 0.75 * (L2 + L3 - L5)) / 2 + (2 * L2 - 0.5 * L3 - 0.5 * L5) / 2),
    # β = 1/4 of p: m = (7/16, 9/16), KL(p‖m) = 1/4 log 4/7 + 3/4 log 4/3, KL(q‖m) = 1/2 log 8/7 + 1/2 log 8/9
    (
        GeneralizedJSD(beta=0.25),
        0.25 * (0.25 * (2 * L2 - L7) + 0.75 * (2 * L2 - L3)) + 0.75 * (3 * L2 - 0.5 * L7 - L3),
    ),
    # α = 1/4 of p: the same mixture, p against it; then of q: m = (5/16, 11/16), q against it.
    (SkewKL(alpha=0.25), 0.25 * (2 * L2 - L7) + 0.75 * (2 * L2 - L3)),
    (SkewReverseKL(alpha=0.25), 3 * L2 - 0.5 * L5 - 0.5 * L11),
    (SkewReverseKL(alpha=0.25, detach_mixture=True), 3 * L2 - 0.5 * L5 - 0.5 * L11),
    (SkewKL(alpha=0.0), KL),
    (SkewReverseKL(alpha=0.0), RKL),
]


@pytest.mark.parametrize(("loss", "expected"), BY_HAND, ids=lambda value: type(value).__name__)
def test_equals_the_value_by_hand(loss, expected):
    batch = make_batch((1,), ("teacher",), (0,), vocab=2)
    assert loss(scores([0.5]), scores([0.25]), batch).total.item() == pytest.approx(expected, rel=1e-12)


class TeachersMass(TokenLoss):
    """A stranger's loss: it writes `divergence` and nothing else."""

    def divergence(self, logp, logq):
        return (logp.exp() - logq.exp()).clamp_min(0)[:, 0]


def test_a_subclass_writes_the_divergence_and_nothing_else():
    output = TeachersMass()(scores(Q_FIRST), scores(P_FIRST), BATCH)
    assert output.metrics["divergence"].tolist() == pytest.approx([0.25, 0.0, 0.5, 0.0])
    assert output.total.item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardKL(reduction="mean"), r"ForwardKL\.reduction must be sequence_mean or token_mean, got 'mean'"),
        (lambda: CrossEntropy(reduction="sum"), r"CrossEntropy\.reduction must be"),
        (lambda: ReverseKL(temperature=0.0), r"ReverseKL\.temperature must be above 0, got 0\.0"),
        (lambda: ReverseKL(temperature=float("nan")), r"ReverseKL\.temperature must be above 0, got nan"),
        (lambda: JeffreysKL(weight=1.01), r"JeffreysKL\.weight must lie in \[0, 1\], got 1\.01"),
        (lambda: JeffreysKL(weight=-0.1), r"JeffreysKL\.weight must lie in \[0, 1\], got -0\.1"),
        (lambda: GeneralizedJSD(beta=0.0), r"GeneralizedJSD\.beta must lie strictly between 0 and 1, got 0\.0"),
        (lambda: GeneralizedJSD(beta=1.0), r"At the ends it vanishes: use ForwardKL or ReverseKL there"),
        (lambda: SkewKL(alpha=1.0), r"SkewKL\.alpha must lie in \[0, 1\), got 1\.0"),
        (lambda: SkewKL(alpha=float("nan")), r"SkewKL\.alpha must lie in \[0, 1\), got nan"),
        (lambda: SkewReverseKL(alpha=-0.01), r"SkewReverseKL\.alpha must lie in \[0, 1\), got -0\.01"),
    ],
)
def test_refuses_a_setting_outside_its_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_accepts_the_ends_that_are_in_range():
    assert SkewKL(alpha=0).alpha == SkewReverseKL(alpha=0).alpha == JeffreysKL(weight=0).weight == 0
    assert JeffreysKL(weight=1).weight == 1


class Reporting(ForwardKL):
    """A divergence that also reports the student's entropy and the mass of its likeliest token."""

    def metrics(self, logp, logq):
        return {"entropy": -(logq.exp() * logq).sum(-1), "top": logq.exp().amax(-1)}


class ReportingByAutograd(Reporting):
    """The same without its closed form."""

    def divergence(self, logp, logq):
        return super().divergence(logp, logq)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("loss", [Reporting(), ReportingByAutograd()])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_reports_metrics_of_each_position_slice_by_slice(loss, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4, 5), generator=generator)
    slicing = Slicing(max_positions=3, compile=compiled)
    student = replace(Scores.from_logits(logits.clone().requires_grad_()), slicing=slicing)
    output = loss(student, Scores.from_logits(torch.randn((4, 5), generator=generator)), BATCH_OF_FIVE)
    probabilities = logits.softmax(-1)
    assert output.metrics["entropy"].tolist() == pytest.approx(
        torch.distributions.Categorical(probabilities).entropy().tolist()
    )
    assert output.metrics["top"].tolist() == pytest.approx(probabilities.amax(-1).tolist())
    plain = ForwardKL()(Scores.from_logits(logits), Scores.from_logits(logits.flip(0)), BATCH_OF_FIVE)
    assert set(plain.metrics) == {"divergence"}


def test_a_reporting_loss_has_the_value_and_the_gradient_of_one_that_reports_nothing():
    teacher = Scores.from_logits(torch.randn(4, 5))
    logits = torch.randn(4, 5)
    outputs = []
    for loss in (ForwardKL(temperature=2.0), Reporting(temperature=2.0), ReportingByAutograd(temperature=2.0)):
        leaf = logits.clone().requires_grad_()
        total = loss(Scores.from_logits(leaf), teacher, BATCH_OF_FIVE).total
        total.backward()
        outputs.append((total.detach(), leaf.grad))
    for total, grad in outputs[1:]:
        torch.testing.assert_close(total, outputs[0][0])
        torch.testing.assert_close(grad, outputs[0][1])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"mean": lambda logq: logq.mean()}, r"one value per position, `\[n\]`: 'mean' has the shape \[\]"),
        ({"whole": lambda logq: logq}, r"'whole' has the shape"),
        ({"constant": lambda logq: 3.0}, r"'constant' has the shape \[\]"),
        ({"divergence": lambda logq: logq.sum(-1)}, r"can't have the name 'divergence'"),
    ],
)
def test_metrics_that_are_not_one_value_per_position_are_named(metrics, words):
    class Wrong(ForwardKL):
        def metrics(self, logp, logq):
            return {name: metric(logq) for name, metric in metrics.items()}

    with pytest.raises(PluginError, match=words):
        Wrong()(scores(Q_FIRST), scores(P_FIRST), BATCH)


@pytest.mark.parametrize("reduce", [lambda values: values.sum(-1).mean(), lambda values: values], ids=["mean", "whole"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_divergence_that_is_not_one_value_per_position_is_named(reduce, with_grad):
    class Wrong(TokenLoss):
        def divergence(self, logp, logq):
            return reduce(logp.exp() * (logp - logq))

    with torch.set_grad_enabled(with_grad), pytest.raises(PluginError, match=r"^Wrong must return one value per pos"):
        Wrong()(scores(Q_FIRST), scores(P_FIRST), BATCH)


def test_a_closed_form_whose_value_is_a_mean_is_named():
    class Wrong(ForwardKL):
        def gradient(self, logp, logq):
            values, grad = super().gradient(logp, logq)
            return values.mean(), grad

    student = scores(Q_FIRST)
    student.hidden.requires_grad_()
    with pytest.raises(PluginError, match=r"^Wrong must return one value per position, `\[n\]`, got the shape \[\]"):
        Wrong()(student, scores(P_FIRST), BATCH)

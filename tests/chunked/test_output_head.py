"""Letters: N positions, n of a slice, D hidden width, V vocabulary."""

import peft
import pytest
import torch
from torch import nn

from distillkit.chunked import accumulate, output_head
from distillkit.chunked.output_head import HeadPass, OutputHead
from distillkit.types import LogitsHead

N, D, V = 11, 6, 13
PARTS = (slice(0, 4), slice(4, 8), slice(8, 11))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(module):
    """The module with weights that depend on nothing but their shapes and places."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + 1))
    return module


def linear(width=V, bias=False, dtype=torch.float64, kind=nn.Linear):
    return filled(kind(D, width, bias=bias, dtype=dtype))


def frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


class Subclass(nn.Linear):
    """No plain linear layer: its result is another."""

    def forward(self, hidden):
        return super().forward(hidden).square()


def network():
    layers = nn.Sequential(nn.Linear(D, 5, dtype=torch.float64), nn.Tanh(), nn.Linear(5, V + 2, dtype=torch.float64))
    return filled(layers)


def with_lora(bias=False):
    """A linear layer that peft has wrapped; the adapter alone is trained."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = linear(V + 2, bias)

        def forward(self, hidden):
            return self.head(hidden)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
        return peft.get_peft_model(Model(), config).base_model.model.head.double()


HEADS = {
    "linear": lambda: OutputHead(linear(), V),
    "bare linear": linear,
    "bare linear with bias": lambda: linear(bias=True),
    "bias": lambda: OutputHead(linear(bias=True), V),
    "cut": lambda: OutputHead(linear(V + 4), V),
    "cut with bias": lambda: OutputHead(linear(V + 4, bias=True), V),
    "scale": lambda: OutputHead(linear(), V, scale=0.3),
    "soft cap": lambda: OutputHead(linear(), V, softcap=2.0),
    "all of it": lambda: OutputHead(linear(V + 4, bias=True), V, scale=0.3, softcap=0.7),
    "frozen weight": lambda: OutputHead(frozen(linear(bias=True), "weight"), V, softcap=2.0),
    "frozen bias": lambda: OutputHead(frozen(linear(bias=True), "bias"), V, scale=2.0),
    "frozen": lambda: OutputHead(frozen(linear(bias=True), "weight", "bias"), V),
    "lora": lambda: OutputHead(with_lora(), V),
    "lora, bias, scale and cap": lambda: OutputHead(with_lora(bias=True), V, scale=0.3, softcap=2.0),
    "network": lambda: OutputHead(network(), V),
    "bare network": lambda: nn.Sequential(network(), nn.Linear(V + 2, V, dtype=torch.float64)),
    "subclass": lambda: OutputHead(linear(kind=Subclass), V),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def by_autograd(head, hidden, weights):
    """Logits, and the gradients of Σ weight · logit by hidden states and parameters, in one piece."""
    leaf = hidden.clone().requires_grad_()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    logits = head(leaf)
    total = (logits * weights.to(logits.dtype)).sum()
    return logits.detach(), *torch.autograd.grad(total, [leaf, *trained], allow_unused=True)


def by_pass(head, hidden, weights, parts=PARTS):
    """The same a slice at a time; each slice's logits are written over by the next one's."""
    job = HeadPass(head, hidden)
    room = torch.empty(max(part.stop - part.start for part in parts), weights.shape[1], dtype=job.stored)
    logits, grads = [], []
    job.start()
    for part in parts:
        out = room[: part.stop - part.start]
        assert job.logits(hidden[part], out, with_grad=True) is out
        logits.append(out.clone())
        out.copy_(weights[part])
        grads.append(job.backward(out).clone())  # it may lie in `out`
    return torch.cat(logits), torch.cat(grads), *job.finished()


def assert_same(found, expected, **tolerance):
    assert len(found) == len(expected) >= 2
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@every_head
def test_logits_and_gradients_are_those_of_autograd(make):
    head, hidden, weights = make(), random(N, D), random(N, V, seed=9)
    assert_same(by_pass(head, hidden, weights), by_autograd(head, hidden, weights), rtol=1e-12, atol=1e-13)


@every_head
@pytest.mark.parametrize("rows", [1, 4, 5, V])
def test_chunks_of_rows_change_nothing(make, rows, monkeypatch):
    monkeypatch.setitem(accumulate.ROWS, "cpu", rows)
    head, hidden, weights = make(), random(N, D), random(N, V, seed=9)
    assert_same(by_pass(head, hidden, weights), by_autograd(head, hidden, weights), rtol=1e-12, atol=1e-13)


@every_head
def test_without_a_gradient_the_logits_are_the_same_and_no_graph_is_made(make):
    head, hidden = make(), random(N, D)
    out = torch.empty(N, V, dtype=torch.float64)
    assert not HeadPass(head, hidden).logits(hidden, out).requires_grad
    torch.testing.assert_close(out, head(hidden).detach(), rtol=1e-13, atol=1e-13)


@every_head
def test_a_second_pass_starts_from_zero(make):
    head, hidden, weights = make(), random(N, D), random(N, V, seed=9)
    job = HeadPass(head, hidden)
    found = []
    for _ in range(2):
        job.start()
        job.logits(hidden, torch.empty(N, V, dtype=torch.float64), with_grad=True)
        found.append((job.backward(weights.clone()), *job.finished(), hidden))
    assert_same(*found, rtol=0, atol=0)


@every_head
def test_no_position_gives_gradients_of_zero(make):
    head, hidden, weights = make(), random(0, D), random(0, V)
    _, by_hidden, *grads = by_pass(head, hidden, weights, parts=[slice(0, 0)])
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert by_hidden.shape == (0, D)
    assert len(grads) == len(trained)
    for own, parameter in zip(grads, trained, strict=True):
        assert own.shape == parameter.shape
        assert not own.any()


def test_only_what_is_trained_has_a_gradient():
    names = {"frozen weight": 1, "frozen bias": 1, "frozen": 0, "lora": 2, "bias": 2, "network": 4}
    for name, number in names.items():
        assert len(HeadPass(HEADS[name](), random(N, D)).leaves) == number, name


def test_tokens_that_are_cut_off_get_a_gradient_of_zero():
    head = OutputHead(linear(V + 4, bias=True), V)
    _, _, by_weight, by_bias = by_pass(head, random(N, D), random(N, V, seed=9))
    assert by_weight.shape == (V + 4, D)
    assert not by_weight[V:].any()
    assert not by_bias[V:].any()
    assert by_weight[:V].abs().min() > 0


def test_the_head_of_logits_hands_the_gradient_back():
    logits, weights = random(N, V), random(N, V, seed=9)
    found = by_pass(LogitsHead(), logits, weights)
    assert_same(found, (logits, weights), rtol=0, atol=0)


class SwitchedOff(nn.Module):
    """A layer beside another that is not used, as an adapter may be."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = network(), nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, hidden):
        return self.used(hidden)


def test_a_parameter_that_the_logits_do_not_use_gets_a_gradient_of_zero():
    head, hidden, weights = OutputHead(SwitchedOff(), V), random(N, D), random(N, V, seed=9)
    *found, by_weight, by_bias = by_pass(head, hidden, weights)
    assert_same(found, by_autograd(head, hidden, weights)[:-2], rtol=1e-12, atol=1e-13)
    assert not by_weight.any()
    assert not by_bias.any()


def test_float32_states_and_weights_give_float32_gradients_close_to_autograds():
    head = OutputHead(linear(V + 4, bias=True, dtype=torch.float32), V, scale=0.3, softcap=2.0)
    hidden, weights = random(N, D, dtype=torch.float32), random(N, V, seed=9, dtype=torch.float32)
    found = by_pass(head, hidden, weights)
    assert {own.dtype for own in found} == {torch.float32}
    assert_same(found, by_autograd(head, hidden, weights), rtol=1e-5, atol=1e-6)


def in_float64(head):
    """The same head with weights of float64 that have the same values."""
    module = head.module
    wide = nn.Linear(D, module.out_features, bias=module.bias is not None, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    return OutputHead(wide, head.vocab, head.scale, head.softcap)


MANY = 3000
HALF = {
    "plain": lambda: OutputHead(linear(dtype=torch.bfloat16), V),
    "cut, bias, scale and cap": lambda: OutputHead(linear(V + 4, True, torch.bfloat16), V, scale=0.3, softcap=2.0),
    "frozen weight": lambda: OutputHead(frozen(linear(V + 4, True, torch.bfloat16), "weight"), V),
}


def half_precision_data():
    """Positive weights and states, so that sums grow: hidden [MANY, D] bfloat16, weights [MANY, V] float32."""
    hidden = random(MANY, D).abs().to(torch.bfloat16)
    return hidden, random(MANY, V, seed=9, dtype=torch.float32).abs()


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=[True, False], ids=["in half precision", "in float32"])
def native(request, monkeypatch):
    """Whether the processor multiplies in half precision."""
    monkeypatch.setattr(output_head, "fast_dtype", lambda dtype, device: dtype if request.param else torch.float32)
    return request.param


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("make", HALF.values(), ids=HALF)
def test_a_half_precision_head_is_summed_with_more_bits_than_it_has(make, rows, monkeypatch):
    monkeypatch.setitem(accumulate.ROWS, "cpu", rows)
    head, (hidden, weights) = make(), half_precision_data()
    parts = [slice(start, start + 10) for start in range(0, MANY, 10)]
    logits, by_hidden, *found = by_pass(head, hidden, weights, parts)
    exact = by_autograd(in_float64(head), hidden.double(), weights.double())
    expected = exact[-len(found) :]  # in float64 no weight is frozen

    shaped = head.softcap is not None  # what is done to logits after the product is done in float32
    assert by_hidden.dtype == torch.float32
    assert logits.dtype == (torch.float32 if shaped else torch.bfloat16)
    # Products and their factors are rounded to 8 bits: 2^-9 of each, and less of their sum. Measured: below 3e-3.
    assert relative(logits, exact[0]) < 2**-8
    assert relative(by_hidden, exact[1]) < 2**-8
    naive = []
    for part in parts:  # what autograd does: each slice's gradient is added in bfloat16
        own = by_autograd(head, hidden[part], weights[part])[2:]
        naive = own if not naive else [total + more for total, more in zip(naive, own, strict=True)]
    assert len(found) == len(naive) == len(expected) > 0
    for own, other, true in zip(found, naive, expected, strict=True):
        assert own.dtype == torch.bfloat16
        assert relative(own, true) < 2**-8
        assert relative(other, true) > 8 * relative(own, true)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rows", [5, 1000])
def test_chunks_of_a_half_precision_head_change_nothing(rows, monkeypatch):
    head = HALF["cut, bias, scale and cap"]()
    hidden, weights = half_precision_data()
    hidden, weights = hidden[:N], weights[:N]
    whole = by_pass(head, hidden, weights)
    monkeypatch.setitem(accumulate.ROWS, "cpu", rows)
    found = by_pass(head, hidden, weights)
    # The gradient of the hidden states is a sum over chunks, each of them a product in bfloat16.
    torch.testing.assert_close(found[1], whole[1], rtol=2**-7, atol=2**-7)
    assert_same((found[0], *found[2:]), (whole[0], *whole[2:]), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("hidden_type", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_in_half_precision_and_sums_in_the_weights_type(
    rows, hidden_type, native, monkeypatch
):
    monkeypatch.setitem(accumulate.ROWS, "cpu", rows)
    head = OutputHead(linear(V + 4, bias=True, dtype=torch.float32), V, scale=0.3, softcap=2.0)
    hidden, weights = half_precision_data()
    hidden, weights = hidden[:N].to(hidden_type), weights[:N]
    exact = by_autograd(in_float64(head), hidden.double(), weights.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = by_pass(head, hidden, weights)
        automatic = by_autograd(head, hidden, weights)
    assert {own.dtype for own in found} == {torch.float32}
    for own, other, true in zip(found, automatic, exact, strict=True):
        assert relative(own, true) < 2**-7  # three roundings to 8 bits; measured: 3e-3
        assert relative(own, true) <= 1.5 * relative(other, true)
    assert (relative(found[0], exact[0]) > 1e-4) == native, "the products are in bfloat16 where the processor has it"


def test_without_a_cap_or_scale_logits_are_kept_in_half_precision_under_autocast(native):
    head, hidden = OutputHead(linear(dtype=torch.float32), V), random(N, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        job = HeadPass(head, hidden)
        logits = job.logits(hidden, torch.empty(N, V, dtype=job.stored))
    assert job.dtype == (torch.bfloat16 if native else torch.float32)
    assert logits.dtype == torch.bfloat16
    assert relative(logits, hidden.double() @ head.module.weight.detach().double().T) < 2**-8


def test_a_pass_keeps_the_type_that_it_was_made_with(monkeypatch):
    monkeypatch.setattr(output_head, "fast_dtype", lambda dtype, device: dtype)
    # A loss that looks at its slices again in the backward pass does so outside of autocast.
    head = OutputHead(linear(V, dtype=torch.float32), V)
    hidden, weights = random(N, D, dtype=torch.float32), random(N, V, seed=9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        job, first = HeadPass(head, hidden), torch.empty(N, V)
        job.logits(hidden, first, with_grad=True)
    second = torch.empty(N, V)
    job.start()
    job.logits(hidden, second, with_grad=True)
    assert torch.equal(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(first, HeadPass(OutputHead(linear(V), V), hidden).logits(hidden, second))
    job.backward(weights)


def test_float64_weights_stay_float64_under_autocast():
    head, hidden, weights = OutputHead(linear(), V), random(N, D), random(N, V, seed=9)
    expected = by_autograd(head, hidden, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_pass(head, hidden, weights)
    assert_same(found, expected, rtol=1e-12, atol=1e-13)

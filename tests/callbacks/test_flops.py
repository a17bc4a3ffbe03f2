"""FLOPs against PyTorch's own count, and by hand."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from distillkit.callbacks import flops
from distillkit.callbacks.flops import ModelFlops, arithmetic_type, matrix_rate, model_flops
from distillkit.models.scoring import packs
from distillkit.testing import make_batch
from distillkit.types import Packed, Segment
from helpers.models import tiny_model

VOCAB, HIDDEN, LAYERS, LENGTH = 320, 32, 2, 24
CPU = torch.device("cpu")


def measured(model: nn.Module, backward: bool = False) -> float:
    """What PyTorch counts for the body on two rows; it takes every token to see the whole row."""
    body = model.get_decoder()
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    with FlopCounterMode(display=False) as counter:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        if backward:
            hidden.sum().backward()
    return float(counter.get_total_flops())


def expected(flops: ModelFlops) -> float:
    return flops.token * 2 * LENGTH + flops.pair * 2 * LENGTH**2


@pytest.mark.parametrize("config", [{}, {"head_dim": 16}, {"num_key_value_heads": 4, "tie_word_embeddings": False}])
def test_the_body_costs_forward_what_pytorch_counts(config: dict[str, object]) -> None:
    model = tiny_model(VOCAB, LAYERS, HIDDEN, attn_implementation="eager", **config)
    assert expected(model_flops(model, trained=False)) == pytest.approx(measured(model), rel=0.02)


def test_a_trained_body_costs_what_pytorch_counts() -> None:
    model = tiny_model(VOCAB, LAYERS, HIDDEN, attn_implementation="eager").train()
    assert expected(model_flops(model, trained=True)) == pytest.approx(measured(model, backward=True), rel=0.02)


def test_frozen_weights_under_lora_have_no_gradient_of_their_own() -> None:
    model = tiny_model(VOCAB, 8, HIDDEN, attn_implementation="eager")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = expected(model_flops(wrapped, trained=True))
    # Nothing before the first layer's adapters needs a gradient: a little less than what is counted.
    assert 0.95 * found < measured(model.train(), backward=True) < found


def test_a_token_meets_only_the_experts_that_are_chosen_for_it() -> None:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = MixtralForCausalLM(config).eval()
    assert expected(model_flops(model, trained=False)) == pytest.approx(measured(model), rel=0.02)


def test_by_hand() -> None:
    model = tiny_model(VOCAB, LAYERS, HIDDEN)
    keys, intermediate = HIDDEN // 2, 2 * HIDDEN
    weights = LAYERS * HIDDEN * (2 * HIDDEN + 2 * keys + 3 * intermediate)
    forward, both = (model_flops(model, trained) for trained in (False, True))
    assert (forward.token, both.token) == (2 * weights, 6 * weights)
    assert (forward.pair, both.pair) == (4 * HIDDEN * LAYERS, 12 * HIDDEN * LAYERS)
    assert (forward.position, both.position) == (2 * HIDDEN * VOCAB, 6 * HIDDEN * VOCAB)
    head = nn.Linear(HIDDEN, VOCAB)
    assert model_flops(head, trained=False) == ModelFlops(position=forward.position)
    assert model_flops(None, trained=False) == ModelFlops()


def test_a_batch_counts_each_token_that_is_seen() -> None:
    batch = make_batch((3, 5), ("teacher", "student"), (0, 0), VOCAB)
    rows, length = batch.input_ids.shape
    flops = ModelFlops(token=1000.0, pair=1.0, position=1e6)
    seen = rows * sum(range(1, length + 1))
    assert flops.of(batch) == 1000 * rows * length + seen + 1e6 * batch.num_tokens

    # A prompt of 3 tokens that responses of 2 and 4 tokens share.
    ids = torch.zeros(1, 9, dtype=torch.long)
    line = Packed(ids, ids, ids[0], (Segment(0, 3, 0, 0), Segment(3, 5, 0, 3), Segment(5, 9, 0, 3)))
    packed = replace(batch, packed=line)
    seen = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)
    assert replace(flops, packed=True).of(packed) == 1000 * 9 + seen + 1e6 * batch.num_tokens
    assert flops.tokens(packed) == rows * length, "a model that takes padded rows gets those"


def test_it_is_known_whether_rows_are_packed() -> None:
    for implementation in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=implementation)
        assert model_flops(model, trained=True).packed is packs(model) is (implementation == "sdpa")


@pytest.mark.parametrize(
    ("own", "inside", "found"),
    [
        (torch.float32, contextlib.nullcontext(), torch.float32),
        (torch.float32, torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
        (torch.bfloat16, contextlib.nullcontext(), torch.bfloat16),
    ],
)
def test_the_type_of_products_is_that_of_the_precision(own: torch.dtype, inside: object, found: torch.dtype) -> None:
    assert arithmetic_type(torch.ones(2, dtype=own), inside) == found


def test_the_rate_is_measured_and_leaves_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    rate, width = matrix_rate(CPU, torch.float32)
    assert width in (256, 512, 1024)
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("per_flop", "width"), [(1e-12, 1024), (2.8e-11, 1024), (3e-11, 512), (1e-9, 256)])
def test_a_slow_device_gets_smaller_matrices(per_flop: float, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def product(self: flops._Product) -> float:
        seconds = per_flop * 2 * len(self.matrix) ** 3
        now[0] += seconds
        return seconds

    monkeypatch.setattr(flops._Product, "seconds", product)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert matrix_rate(CPU, torch.float32) == (pytest.approx(1 / per_flop), width)
    assert now[0] < 0.5

"""What a model is tried for when it is taken up. Letters: T tokens of a row."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from distillkit.errors import ModelError
from distillkit.models import packing
from distillkit.models.capabilities import capabilities, probe_tokens
from distillkit.models.exact import in_float32
from distillkit.testing.families import tiny_family
from distillkit.testing.family_checks import check_generation, check_scores, plain_model
from helpers.families import made

# Rows that flow into one another.


class Shifted(LlamaMLP):
    """Adds a share of the token before, as convolutions and shifts of tokens do; no cache tells of it."""

    share = 1e-3

    def forward(self, hidden):
        output = super().forward(hidden)
        return output + self.share * nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def shifted(share, dtype=torch.float32):
    model = made(LlamaForCausalLM, LlamaConfig)
    model.model.layers[1].mlp.__class__ = Shifted
    model.model.layers[1].mlp.share = share
    return model.to(dtype)


@pytest.mark.parametrize("share", [1.0, 1e-1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_flow_between_packed_rows_is_seen_also_below_the_rounding_of_the_weights(share, dtype):
    found = capabilities(shifted(share, dtype))
    assert found.layout == "padded"
    assert "the tokens of a packed row change the states of another by" in found.reason


@pytest.mark.parametrize(
    "name", ["lfm2", "qwen3_5_text", "qwen3_next", "granitemoehybrid", "jamba", "falcon_h1", "bamba"]
)
def test_rows_of_models_with_a_state_are_padded(name):
    assert capabilities(tiny_family(name)) == replace(
        capabilities(tiny_family(name)),
        layout="padded",
        reason="some of its layers carry a state from each token to the next",
    )


def test_a_default_lfm2_is_given_padded_rows():
    # Its states differ by 4 % of their norm where rows are packed, which a limit of 5 % took for rounding.
    model = tiny_family("lfm2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
    assert capabilities(model).layout == "padded"
    check_scores(model, plain_model(model))


class Crowded(LlamaMLP):
    """Computes something else in a batch of several rows, as experts of limited capacity do."""

    def forward(self, hidden):
        return super().forward(hidden) * (1.0 if len(hidden) == 1 else 1.01)


def test_rows_that_depend_on_their_batch_are_run_one_by_one(caplog):
    model = made(LlamaForCausalLM, LlamaConfig, vocab_size=64)
    model.model.layers[1].mlp.__class__ = Crowded
    with caplog.at_level(logging.INFO, logger="distillkit.models.capabilities"):
        assert capabilities(model).layout == "single"
        check_scores(model, plain_model(model))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "distillkit.models.capabilities"]
    assert "LlamaForCausalLM runs on single rows: padding changes its hidden states by 0.0" in message


# Masks and options of attention that short rows don't show.


@pytest.mark.parametrize("size", [4, 1000, 8192])
def test_chunks_of_any_size_are_seen_by_rows_of_any_length(size):
    found = capabilities(tiny_family("llama4_text", attention_chunk_size=size))
    assert (found.layout, found.reason) == (
        "padded",
        "its attention masks are not causal ones with a sliding window alone",
    )


@pytest.mark.parametrize("size", [4, 1000, 4096])
def test_a_window_that_only_the_mask_knows_is_seen(size, monkeypatch):
    assert capabilities(tiny_family("gemma3_text", sliding_window=size)).layout == "packed"
    attention = packing.attention

    def without_window(*args, sliding_window=None, **kwargs):
        return attention(*args, **kwargs)

    monkeypatch.setattr(packing, "attention", without_window)
    assert "its attention masks are not causal" in capabilities(tiny_family("gemma3_text", sliding_window=size)).reason


def test_an_option_that_sdpa_leaves_out_makes_attention_eager():
    model = tiny_family("gpt_oss")
    model.config._attn_implementation = "sdpa"
    found = capabilities(model)
    assert found.reason == "sdpa leaves out of its attention s_aux; it is eager instead"
    assert model.config._attn_implementation == "eager"
    check_scores(model, plain_model(model))


def test_a_soft_cap_holds_for_packed_and_padded_rows():
    model = tiny_family("gemma2", attn_logit_softcapping=2.0)
    check_scores(model, plain_model(model))
    packed = capabilities(model)
    assert packed.layout == "packed"
    # Without packed rows too, where transformers' sdpa would take over again.
    model = tiny_family("gemma2", attn_logit_softcapping=2.0)
    model.config.get_text_config().layer_types = ["sliding_attention"] * 4
    object.__setattr__(model, "_distillkit_capabilities", replace(packed, layout="padded", reason="a test"))
    packing.register()
    model.config._attn_implementation = packing.NAME
    check_scores(model, plain_model(model))


def test_attention_that_looks_at_the_name_of_its_implementation_keeps_it():
    model = tiny_family("falcon")
    found = capabilities(model)
    assert (found.layout, model.config._attn_implementation) == ("padded", "sdpa")
    assert found.reason == "its layers don't use transformers' attention, which packed rows need"


# Models that can't be used.


def test_a_model_whose_tokens_attend_to_later_ones_is_refused():
    with pytest.raises(ModelError, match="student x: tokens of CpmAntForCausalLM attend to later ones"):
        capabilities(tiny_family("cpmant"), "student x")


class Raising(LlamaForCausalLM):
    """Fails as unfinished code does."""

    def forward(self, *args, **kwargs):
        raise AttributeError("'NoneType' object\nhas no attribute 'shape'")


def test_whatever_a_model_raises_is_one_line():
    model = made(LlamaForCausalLM, LlamaConfig)
    model.__class__ = Raising
    with pytest.raises(ModelError) as caught:
        capabilities(model, "student x")
    assert str(caught.value) == (
        "student x: a test pass over 4 tokens fails with AttributeError: 'NoneType' object has no attribute 'shape'. "
        "distillkit does not support this model."
    )


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
def test_an_attention_implementation_that_fails_is_named():
    model = tiny_family("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match="student x: its test passes fail with attn_implementation flex_attention"):
        capabilities(model, "student x")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    model = made(LlamaForCausalLM, LlamaConfig)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ModelError, match="student x: the logits of LlamaForCausalLM are not finite in a test pass"):
        capabilities(model, "student x")


@pytest.mark.parametrize("settings", [{"eos_token_id": [3, 8, 13]}, {"pad_token_id": -1}, {"eos_token_id": None}])
def test_special_tokens_in_any_form_are_understood(settings):
    # Llama 3 has three end tokens in its config, and -1 stands for no token in old ones.
    model = tiny_family("llama", **settings)
    ends = settings.get("eos_token_id") or []
    assert not set(ends) & set(probe_tokens(model, 11).tolist())
    assert capabilities(model).layout == "packed"
    check_scores(model, plain_model(model))
    check_generation(model, plain_model(model))


@pytest.mark.parametrize("name", ["llama4_text", "llama4"])
def test_a_model_that_names_itself_as_its_decoder_is_used(name):
    model = tiny_family(name)
    check_scores(model, plain_model(model))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("xlstm", {"output_logit_soft_cap": 3.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("minicpm3", {"dim_model_base": 8}),
    ],
)
def test_scales_and_caps_of_logits_by_other_names_are_honoured(name, settings):
    model = tiny_family(name, **settings)
    check_scores(model, plain_model(model))


def test_a_soft_cap_that_small_logits_do_not_show_is_seen(monkeypatch):
    model = tiny_family("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    monkeypatch.setattr("distillkit.models.heads._SOFTCAPS", ())
    with pytest.raises(ModelError, match=r"the logits of Gemma2ForCausalLM are not its output head .* differ by \d"):
        capabilities(model)


# Forward passes in float32.


def test_weights_are_wide_in_the_context_and_the_same_afterwards():
    model = made(LlamaForCausalLM, LlamaConfig).bfloat16()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    types = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, _, output: types.append(output.dtype))
    with torch.no_grad(), in_float32(model):
        wide = model.model(input_ids=torch.arange(5)[None]).last_hidden_state
    with torch.no_grad():
        expected = made(LlamaForCausalLM, LlamaConfig).bfloat16().float().model(input_ids=torch.arange(5)[None])
    assert types == [torch.float32]
    torch.testing.assert_close(wide, expected.last_hidden_state, rtol=1e-6, atol=1e-6)
    assert_unchanged(model, before)


def test_weights_are_the_same_after_an_error():
    model = made(LlamaForCausalLM, LlamaConfig).bfloat16()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), in_float32(model):
        model.model(input_ids=torch.arange(5)[None])
    assert_unchanged(model, before)


def assert_unchanged(model, before):
    for name, tensor in model.named_parameters():
        address, value = before[name]
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, value)
    assert not any(module._forward_hooks for module in model.model.layers)

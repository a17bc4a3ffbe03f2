import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from distillkit.errors import ModelError
from distillkit.models.pruning import keep_layers
from distillkit.testing.families import tiny_family
from distillkit.testing.family_checks import check_export, check_pruning
from helpers.models import tiny_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def llama():
    return tiny_model(64, layers=4)


def qwen():
    config = Qwen2Config(**SMALL, num_hidden_layers=4, layer_types=MIXED, use_sliding_window=True, sliding_window=3)
    return Qwen2ForCausalLM(config).eval()


def gemma():
    config = Gemma3TextConfig(**SMALL, num_hidden_layers=4, layer_types=MIXED, sliding_window=3)
    return Gemma3ForCausalLM(config).eval()


MODELS = [llama, qwen, gemma]
TOKENS = torch.arange(2, 14).reshape(2, 6)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param()


def test_the_layers_that_stay_are_the_named_ones(model):
    before = list(model.model.layers)
    keep_layers(model, [0, 1, 3])
    assert list(model.model.layers) == [before[0], before[1], before[3]]
    assert model.config.num_hidden_layers == 3


def test_a_dropped_layer_is_one_that_adds_nothing(model):
    # A layer that adds zero to the residual stream is the same as no layer.
    dropped = model.model.layers[2]
    for module in (dropped.self_attn.o_proj, dropped.mlp.down_proj):
        nn.init.zeros_(module.weight)
    expected = logits(model)
    keep_layers(model, [0, 1, 3])
    torch.testing.assert_close(logits(model), expected)


def test_positions_and_per_layer_settings_follow(model):
    types = getattr(model.config, "layer_types", None)
    keep_layers(model, [1, 2])
    indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in model.model.layers]
    assert indices == [{0}, {1}]
    if types is not None:
        assert model.config.layer_types == types[1:3]


def test_a_saved_pruned_model_comes_back_the_same(model, tmp_path):
    keep_layers(model, [0, 3])
    assert_comes_back(model, tmp_path)


def assert_comes_back(model, folder):
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))


def test_generation_with_a_cache_is_generation_without(model):
    keep_layers(model, [0, 2, 3])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 1}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@pytest.mark.parametrize("layers", [[0, 4], [-1, 0], []])
def test_layers_that_the_model_lacks_are_refused(layers):
    with pytest.raises(ModelError, match=r"Student\.keep_layers must name some of the model's 4 layers, 0 to 3"):
        keep_layers(llama(), layers)


@pytest.mark.parametrize("name", ["gpt2", "mamba", "falcon_h1", "llama4_text"])
def test_layers_by_any_name_are_dropped_and_the_rest_is_trained_and_saved_like_any_model(name, tmp_path):
    check_export(tiny_family(name), str(tmp_path))
    check_pruning(str(tmp_path))


def test_an_architecture_that_can_not_have_fewer_layers_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"^Student\.keep_layers can't be used with Gemma3nForCausalLM") as caught:
        keep_layers(tiny_family("gemma3n_text"), [0, 2, 3])
    assert "\n" not in str(caught.value)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ModelError, match=r"Student\.keep_layers .* Linear has none"):
        keep_layers(nn.Linear(2, 2), [0])


def test_a_model_whose_layers_compute_by_their_index_is_refused_though_all_shapes_agree():
    config = DiffLlamaConfig(**SMALL | {"num_key_value_heads": 2}, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"depend on their index .*\(model\.layers\.1\.self_attn\.lambda_init\)"):
        keep_layers(DiffLlamaForCausalLM(config), [0, 3])
    keep_layers(DiffLlamaForCausalLM(config), [0, 1])  # each keeps its index


def test_a_setting_that_short_rows_do_not_show_is_compared_too():
    model = gemma()
    model.model.layers[1].self_attn.sliding_window = 5000
    with pytest.raises(ModelError, match="depend on their index"):
        keep_layers(model, [1, 2])


def test_indices_of_layers_in_the_config_follow(tmp_path):
    config = Qwen2MoeConfig(
        **SMALL,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    keep_layers(model, [1, 2])
    assert model.config.mlp_only_layers == [0]
    assert_comes_back(model, tmp_path)

"""Which layers get an adapter, what is said of the others, and names that the model does not have."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SiglipVisionConfig,
)

from distillkit.errors import ConfigError
from distillkit.models.adaptable import unadaptable
from distillkit.models.adapters import Lora, add_adapters
from distillkit.testing.families import tiny_family
from distillkit.testing.family_checks import check_export, check_lora
from helpers.families import SETTINGS, made
from helpers.models import tiny_model


def mamba() -> Any:
    return made(MambaForCausalLM, MambaConfig, state_size=4)


def adapted_names(model: Any) -> set[str]:
    """The last parts of the names of the layers with an adapter."""
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    return {name.removesuffix(".base_layer").rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nope"], r"\['nope'\] can't be adapted in LlamaForCausalLM, whose linear layers are down_proj, gate_proj"),
        ("nope.*", r"nope\.\* can't be adapted in LlamaForCausalLM"),
        (["q_proj", "nope", "no"], "LlamaForCausalLM has no no, nope. Its linear layers are down_proj, gate_proj"),
        (["q_proj", "norm"], r"can't be adapted .* peft says: Target module LlamaRMSNorm"),
    ],
)
def test_a_name_that_can_not_be_adapted_is_refused_in_one_line(targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Lora\.target_modules: .*{message}") as caught:
        add_adapters(tiny_model(), Lora(r=2, target_modules=targets))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["out_proj", "conv1d", "dt_proj"])
def test_a_layer_of_mamba_on_which_an_adapter_would_do_nothing_is_refused(layer: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Lora\.target_modules: .*{layer}") as caught:
        add_adapters(mamba(), Lora(r=2, target_modules=["in_proj", layer]))
    assert "\n" not in str(caught.value)


def test_all_linear_takes_what_can_be_adapted_and_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distillkit"):
        model = add_adapters(mamba(), Lora(r=2))
    assert adapted_names(model) == {"in_proj", "x_proj"}
    assert "adapters on 2 in_proj, 2 x_proj; left out: 2 dt_proj, 2 out_proj." in caplog.text


NOT_ADAPTABLE = {
    "zamba": ("q_proj", "uses the weights of q_proj in several layers"),
    "zamba2": ("in_proj", None),
    "deepseek_v4": ("o_a_proj", "has more in its layer o_a_proj than a product with its weights"),
    "phimoe": ("router", "has more in its layer router than a product with its weights"),
    "llama4_text": ("router", "has more in its layer router than a product with its weights"),
}
"""A layer of each type, and why it can't have an adapter; None if it can."""


@pytest.mark.parametrize("name", NOT_ADAPTABLE)
def test_a_layer_that_is_shared_or_no_plain_product_is_refused_by_name(name: str) -> None:
    layer, reason = NOT_ADAPTABLE[name]
    if reason is None:
        assert adapted_names(add_adapters(tiny_family(name), Lora(r=2, target_modules=[layer]))) == {layer}
        return
    with pytest.raises(ConfigError, match=rf"^Lora\.target_modules: \w+ {reason}.*\. Leave it out\.$"):
        add_adapters(tiny_family(name), Lora(r=2, target_modules=[layer]))


@pytest.mark.parametrize("name", [*NOT_ADAPTABLE, "recurrent_gemma"])
def test_all_linear_leaves_such_layers_out_so_that_the_merged_model_is_the_trained_one(
    name: str, tmp_path: Path
) -> None:
    check_export(tiny_family(name), str(tmp_path))
    check_lora(str(tmp_path))


def test_weights_that_layers_share_are_as_before_after_the_search() -> None:
    before, after = tiny_family("zamba"), tiny_family("zamba")
    unadaptable(after)
    weights = after.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in before.state_dict().items())


def test_adapters_that_would_get_no_gradient_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Student\.lora can't be used with Reformer\w+, whose own backward pass"):
        add_adapters(tiny_family("reformer"), Lora(r=2))


def test_the_pass_in_training_mode_draws_no_random_numbers_of_the_run() -> None:
    drawn = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        add_adapters(tiny_family("gpt2", resid_pdrop=dropout), Lora(r=2))
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_looking_for_bypassed_layers_changes_no_weight() -> None:
    before, after = mamba(), mamba()
    add_adapters(after, Lora(r=2))
    weights = {name.replace(".base_layer", ""): weight for name, weight in after.state_dict().items()}
    assert all(torch.equal(weights[name], weight) for name, weight in before.state_dict().items())


def test_experts_with_an_adapter_and_without_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distillkit"):
        add_adapters(
            made(GptOssForCausalLM, GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1), Lora(r=2)
        )
        add_adapters(made(MixtralForCausalLM, MixtralConfig, num_local_experts=2), Lora(r=2))
    first, second = caplog.messages
    assert first.endswith(
        "adapters on 2 k_proj, 2 o_proj, 2 q_proj, 2 v_proj; left out: 2 down_proj, 2 gate_up_proj, 2 router."
    )
    assert "2 gate_up_proj" in second
    assert "left out" not in second


def test_a_vision_tower_gets_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = SETTINGS | {"head_dim": 8, "sliding_window": 4}
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    with caplog.at_level(logging.INFO, "distillkit"):
        model = add_adapters(Gemma3ForConditionalGeneration(config), Lora(r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all("language_model" in name for name in trained)
    assert "left out: 9 linear layers outside the language model." in caplog.text

"""Models of several families, with adapters and without, as they are written and read back."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from distillkit.errors import ModelError
from distillkit.models.adapters import Lora, add_adapters
from distillkit.models.export import stored_dtype, write_merged
from distillkit.models.generation_config import exportable
from distillkit.models.options import DEFAULT
from distillkit.models.scoring import base_model
from helpers.families import MODELS, made
from helpers.models import END_ID, save_tiny, tiny_model

TOKENS = torch.arange(2, 14).reshape(2, 6)
FAMILIES = {name: MODELS[name] for name in ("llama, grouped", "gemma2 without a cap on scores", "gemma3", "gpt2")} | {
    "mixtral": lambda: made(MixtralForCausalLM, MixtralConfig, num_local_experts=2),
    "gpt-oss": lambda: made(GptOssForCausalLM, GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "mamba": lambda: made(MambaForCausalLM, MambaConfig, state_size=4),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapted(model: Any, targets: Any) -> Any:
    """A model whose adapters change it."""
    wrapped = add_adapters(model, Lora(r=4, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def written(model: Any, folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers reads it from the folder that it was written to."""
    config, _ = exportable(base_model(model), (1,), "the model")
    divergence = write_merged(model, folder, dtype, config, DEFAULT)
    assert divergence < (1e-6 if dtype == torch.float32 else 0.05)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_written_as_it_was_trained(family: str, tmp_path: Any) -> None:
    plain = logits(FAMILIES[family]())
    model = adapted(FAMILIES[family](), "all-linear")
    expected = logits(model)
    assert not torch.allclose(plain, expected, atol=0.1)
    torch.testing.assert_close(logits(written(model, tmp_path / "merged")), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model), expected, msg="the trained model has not changed")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_half_precision_is_written_once_rounded(family: str, tmp_path: Any) -> None:
    model = FAMILIES[family]()
    again = written(model, tmp_path / "rounded", torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_adapters_on_tied_embeddings_are_merged_into_separate_ones(targets: list[str], tmp_path: Any) -> None:
    model = adapted(tiny_model(), targets)
    assert base_model(model).config.tie_word_embeddings
    expected = logits(model)
    again = written(model, tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)
    assert again.config.tie_word_embeddings is False
    assert base_model(model).config.tie_word_embeddings, "the trained model has not changed"


INEFFECTIVE = [
    {"do_sample": False, "temperature": 0.9},
    {"do_sample": False, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
    {"output_scores": True, "output_logits": True},
    {"pad_token_id": -1},
    {"use_cache": False, "cache_implementation": "static"},
]


@pytest.mark.parametrize("settings", INEFFECTIVE, ids=lambda settings: "+".join(settings))
def test_settings_without_effect_are_left_out_of_a_generation_config(settings: dict[str, Any], tmp_path: Any) -> None:
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="is invalid"):
        model.generation_config.save_pretrained(tmp_path)
    config, removed = exportable(model, (END_ID, 7), "the model")
    config.save_pretrained(tmp_path)
    assert set(removed) == set(settings) - {"do_sample", "num_beams", "use_cache"}
    assert config.eos_token_id == [END_ID, 7]
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def test_a_fault_in_a_generation_config_is_refused_by_name() -> None:
    model = tiny_model()
    model.generation_config.max_new_tokens = 0
    with pytest.raises(ModelError, match=r"^the model: the generation config can't be saved.*max_new_tokens"):
        exportable(model, (END_ID,), "the model")


def test_the_type_of_a_source_is_that_of_its_config_or_else_of_its_weights(tmp_path: Any) -> None:
    source = save_tiny(tmp_path)
    assert stored_dtype(str(source), DEFAULT) == torch.float32
    tiny_model().bfloat16().save_pretrained(source)
    assert stored_dtype(str(source), DEFAULT) == torch.bfloat16
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"dtype": "bfloat16",', ""))
    assert stored_dtype(str(source), DEFAULT) == torch.bfloat16
    # Masks and counters come first by name in some checkpoints, such as GPT-Neo's.
    weights = load_file(source / "model.safetensors")
    save_file({"a.mask": torch.ones(2, dtype=torch.uint8), **weights}, source / "model.safetensors")
    assert stored_dtype(str(source), DEFAULT) == torch.bfloat16

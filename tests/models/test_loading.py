import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from distillkit.errors import ConfigError, ModelError
from distillkit.generators.local import LocalGenerator
from distillkit.models.loading import compile_layers, load_model
from distillkit.models.merging import merge_lora
from distillkit.models.structure import decoder_layers
from distillkit.models.student import Student
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.testing.families import tiny_family
from helpers.models import save_tiny, tiny_model

TOKENS = torch.arange(2, 14).reshape(2, 6)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_saved_model_comes_back_the_same(folder):
    model = load_model(str(folder), "float32")
    expected = tiny_model()
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_have_the_type_and_rotary_frequencies_stay_in_float32(folder, dtype):
    model = load_model(str(folder), dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_attention_kernel_is_the_named_one(folder):
    assert load_model(str(folder), "float32", "eager").config._attn_implementation == "eager"


def test_an_unknown_attention_kernel_is_refused(folder):
    with pytest.raises(ModelError, match=r"model: the model can't be loaded.*no-such-kernel"):
        load_model(str(folder), "float32", "no-such-kernel")


def test_further_arguments_reach_transformers_and_those_with_a_setting_of_their_own_are_refused(folder):
    model = load_model(str(folder), "float32", model_kwargs={"rms_norm_eps": 0.5})
    assert model.config.rms_norm_eps == 0.5
    for part in (Student, TransformersTeacher, LocalGenerator):
        assert part(str(folder), model_kwargs={"rms_norm_eps": 0.5}).model_kwargs == {"rms_norm_eps": 0.5}
        with pytest.raises(ConfigError, match=rf"{part.__name__}\.model_kwargs can't set revision"):
            part(str(folder), model_kwargs={"revision": "v1"})
    for part in (TransformersTeacher, LocalGenerator):
        assert part(str(folder), model_kwargs={"rms_norm_eps": 0.5}).identity() != part(str(folder)).identity()


def test_nothing_is_printed_and_the_settings_of_transformers_stay(folder, capfd):
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_model(str(folder), "float32")
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_a_missing_tensor_is_refused(folder):
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"model: 1 of its tensors are missing.*: model\.norm\.weight\."):
        load_model(str(folder), "float32")


def test_an_unexpected_tensor_is_refused(folder):
    edit_weights(folder, lambda weights: weights.update(stranger=torch.zeros(1)))
    with pytest.raises(ModelError, match=r"model: 1 of its tensors are not among.*: stranger\."):
        load_model(str(folder), "float32")


def test_a_tensor_of_another_shape_is_refused(folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(5)}))
    with pytest.raises(ModelError, match=r"model: 1 of its tensors are in other shapes.*: model\.norm\.weight\."):
        load_model(str(folder), "float32")


def test_more_layers_in_the_config_than_in_the_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"9 of its tensors are missing.* and 6 more"):
        load_model(str(folder), "float32")


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("model.safetensors", "short")])
def test_a_broken_file_is_one_line_that_names_the_source(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=f"{folder}: the model can't be loaded") as caught:
        load_model(str(folder), "float32")
    assert "\n" not in str(caught.value)


def test_a_model_without_adapters_is_returned_itself():
    model = tiny_model()
    assert merge_lora(model) is model


def test_merged_adapters_give_the_same_logits_and_save_as_a_plain_model(tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config).eval()
    expected = model(TOKENS).logits
    merged = merge_lora(model)
    assert not torch.allclose(expected, tiny_model()(TOKENS).logits, atol=1e-2)
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(str(tmp_path), "float32")(TOKENS).logits, merged(TOKENS).logits)


def test_merging_leaves_the_model_to_be_trained_on():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_in_place_does_not_touch_the_file(folder):
    # transformers maps the file into memory instead of reading it.
    model = load_model(str(folder), "float32")
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_named(folder, value):
    def edit(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    edit_weights(folder, edit)
    message = r"model: its tensor model\.layers\.1\.mlp\.up_proj\.weight has entries that are NaN or infinite"
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), "float32")


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mamba", "opt"])
def test_layers_of_any_name_are_compiled(name):
    model = tiny_family(name)
    compile_layers(model, True)
    layers = getattr(*decoder_layers(model))
    assert len(layers) == 4
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_a_model_without_one_list_of_layers_is_not_compiled():
    with pytest.raises(ModelError, match="HrmTextForCausalLM has no list of decoder layers to compile"):
        compile_layers(tiny_family("hrm_text"), True)

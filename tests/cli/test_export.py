"""`distillkit export`: from a run's folder or a checkpoint to a folder, a GGUF file and the hub."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import DistillData, DistillModule, Lora, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.cli.main import main
from distillkit.losses import ForwardKL
from distillkit.models.provenance import Provenance, provenance, public_name
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.workflows.checkpoints import choose_checkpoint
from helpers.hub import hub
from helpers.models import save_tiny
from helpers.runs import QUIET, save_models, write_prompts
from helpers.servers import Reply, serving


@pytest.fixture(autouse=True)
def _no_open_connections() -> Iterator[None]:
    """Closes the connections that the hub's library keeps open."""
    yield
    huggingface_hub.close_session()


def trained(root: Path, name: str, student: Student, callbacks: list[Any]) -> Path:
    """A run of two epochs of two steps, on the models in `root`."""
    rows = write_prompts(root / "train.jsonl", 4, response=True)
    module = DistillModule(student, ForwardKL(), TransformersTeacher(str(root / "teacher"), dtype="float32"))
    options = QUIET | {"max_epochs": 2, "default_root_dir": root / name, "logger": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(**options, callbacks=callbacks)
    trainer.fit(module, DistillData(rows, rows, batch_size=2, seed=7))
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_models(folder)
    card = "---\nlicense: mit\nbase_model: some/base\n---\n"
    (folder / "student" / "README.md").write_text(card)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A run that monitors a metric by which its first epoch is the best."""
    best = ModelCheckpoint(root / "run" / "checkpoints", "best-{step}", monitor="val/kl", mode="max")
    return trained(root, "run", Student(str(root / "student")), [RunCheckpoint(), best])


@pytest.fixture(scope="module")
def lora(root: Path) -> Path:
    """A run with adapters and without a monitor."""
    return trained(root, "lora", Student(str(root / "student"), lora=Lora(r=2)), [RunCheckpoint()])


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_best_checkpoint_is_taken_where_a_callback_monitors_one_and_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints" / "best-step=2.ckpt"
    assert choose_checkpoint(run) == choose_checkpoint(run, "best") == (best, "the best by val/kl")
    assert choose_checkpoint(run, "last") == (run / "checkpoints" / "step=0000004.ckpt", "the newest")
    weights = {}
    for which in ("best", "last"):
        assert main(["export", str(run), "--to", str(tmp_path / which), "--which", which]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"The student of {choose_checkpoint(run, which)[0]} " + (
            f"(the best by val/kl) is in {tmp_path / which}."
            if which == "best"
            else f"(the newest) is in {tmp_path / which}."
        )
        assert lines[1] == f"Talk to it with: distillkit chat {tmp_path / which}"
        weights[which] = load_file(tmp_path / which / "model.safetensors")
        saved = torch.load(choose_checkpoint(run, which)[0])["state_dict"]
        assert all(torch.equal(saved[f"student.{name}"], value) for name, value in weights[which].items())
    assert any(not torch.equal(value, weights["last"][name]) for name, value in weights["best"].items())


def test_a_checkpoint_of_a_folder_that_moved_is_still_the_best(run: Path, tmp_path: Path) -> None:
    moved = Path(os.path.normpath(tmp_path / "moved"))
    run.rename(moved)
    try:
        assert choose_checkpoint(moved)[0] == moved / "checkpoints" / "best-step=2.ckpt"
    finally:
        moved.rename(run)


def test_what_can_not_be_exported_is_one_line(
    run: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = str(tmp_path / "new")
    assert "There is no checkpoint" in error_of([str(tmp_path / "x.ckpt"), "--to", new], capsys)
    assert "has no checkpoint. Name the folder of a run" in error_of([str(tmp_path), "--to", new], capsys)
    student = run.parent / "student"
    assert f"{student} is a model already." in error_of([str(student), "--to", new], capsys)
    assert "names no best checkpoint" in error_of([str(lora), "--to", new, "--which", "best"], capsys)
    file = str(lora / "checkpoints" / "last.ckpt")
    assert "is no run folder" in error_of([file, "--to", new, "--which", "last"], capsys)
    assert "is not empty. Name a new folder" in error_of([file, "--to", str(run)], capsys)
    assert "adapter_only needs adapters" in error_of([str(run), "--to", new, "--adapter-only"], capsys)
    assert "--gguf is written from a merged" in error_of([file, "--to", new, "--adapter-only", "--gguf"], capsys)
    options = ["--adapter-only", "--dtype", "float16"]
    assert "dtype is that of a merged model" in error_of([file, "--to", new, *options], capsys)
    assert not Path(new).exists()


def test_adapters_are_merged_or_written_alone(root: Path, lora: Path, tmp_path: Path) -> None:
    assert main(["export", str(lora), "--to", str(tmp_path / "merged"), "--merge", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert main(["export", str(lora), "--to", str(tmp_path / "alone"), "--adapter-only"]) == 0
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"adapter_model.safetensors", "README.md"} <= names
    assert "model.safetensors" not in names
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "AutoPeftModelForCausalLM.from_pretrained" in card
    assert "trained by LoRA of rank 2" in card


def test_the_card_says_how_to_use_it_what_it_is_and_no_local_path(root: Path, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["export", str(run), "--to", str(target), "--which", "last"]) == 0
    card = (target / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["base_model"] == "some/base"
    assert header["library_name"] == "transformers"
    body = card.split("---", 2)[2]
    assert str(root) not in card
    assert str(tmp_path) not in card
    assert "AutoModelForCausalLM.from_pretrained" in body
    assert "\ndistillkit chat out\nvllm serve out\n" in body
    assert "| training | 4 steps, 2 epochs, precision 32-true |" in body
    assert "| seeds | seed_everything 0, data.seed 7 |" in body
    assert f"torch {torch.__version__}" in body
    assert "| prompts | train: 4 from `train.jsonl`; val: 4 from `train.jsonl` |" in body
    assert "The reference responses were generated by the teacher" in body
    assert "| teacher | `teacher` |" in body
    assert "The tokenizer needs transformers 5 or later" in body
    assert json.loads((target / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"


def test_the_code_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--to", "exports/out"]) == 0
    code = (tmp_path / "exports" / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    shown: list[str] = []
    exec(code, {"print": shown.append})
    assert "What is the capital of France?" in shown[0]


def test_everybody_can_read_the_files(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("form", ["folder", "adapter"])
def test_the_origin_of_a_model_is_that_of_its_card(form: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    assert provenance(str(model)) == Provenance()
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\nText")
    source = model
    if form == "adapter":
        source = tmp_path / "adapter"
        source.mkdir()
        (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    assert provenance(str(source)) == Provenance("a/b", "apache-2.0")
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    assert provenance(str(source)) == Provenance()


def test_a_local_path_is_shown_by_its_name_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "big").mkdir(parents=True)
    assert public_name(str(tmp_path / "x" / "y.jsonl")) == "y.jsonl"
    assert public_name("models/big") == "big"
    assert public_name("../elsewhere/big") == "big"
    assert public_name("org/model") == "org/model"
    assert public_name("wheel:a==1/b/c.gguf") == "wheel:a==1/b/c.gguf"


# ── GGUF and the hub ──────────────────────────────────────────────────────────────────────────────────────────────────

CONVERTER = """#!{python}
# Stands for llama.cpp's converter: the same arguments, and a GGUF file with no tensors.
import argparse, sys
from gguf import GGUFWriter
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
arguments = parser.parse_args()
if arguments.outtype == "q8_0":
    sys.exit("Model LlamaForCausalLM is not supported")
writer = GGUFWriter(arguments.outfile, "llama")
writer.add_name(arguments.outtype)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
"""


def test_a_gguf_file_is_written_by_the_converter_that_is_installed(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    line = error_of([str(run), "--to", str(tmp_path / "out"), "--gguf"], capsys)
    assert "--gguf needs llama.cpp's convert_hf_to_gguf.py, which is not on the PATH. Install" in line
    assert not (tmp_path / "out").exists()
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--gguf", "f16"]) == 0
    assert f"As GGUF: {tmp_path / 'out' / 'out-f16.gguf'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "out-f16.gguf").read_bytes()[:4] == b"GGUF"
    line = error_of([str(run), "--to", str(tmp_path / "more"), "--gguf", "q8_0"], capsys)
    assert "which is complete without a GGUF file. It says: Model LlamaForCausalLM is not supported" in line
    assert not list((tmp_path / "more").glob("*.gguf"))
    assert not list((tmp_path / "more").glob(".*"))


def test_an_upload_is_refused_before_anything_is_written_without_a_token_or_a_name(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    arguments = [str(run), "--to", str(tmp_path / "out"), "--push-to-hub"]
    assert "needs a token that may write: run `hf auth login`" in error_of([*arguments, "me/student"], capsys)
    assert "Write USER/NAME." in error_of([*arguments, "not a name"], capsys)
    assert "whose? Write USER/NAME." in error_of([*arguments, "student"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_leaves_the_folder_and_the_command_to_go_on(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with serving(lambda request: Reply({"error": "Invalid token"}, 401)) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        arguments = [str(run), "--to", str(tmp_path / "out"), "--push-to-hub", "me/student"]
        line = error_of(arguments, capsys)
    assert "me/student can't be uploaded: " in line
    assert "401" in line
    assert f"run `hf upload me/student {tmp_path / 'out'}`" in line
    card = (tmp_path / "out" / "README.md").read_text()
    assert '.from_pretrained("me/student")' in card


def test_a_student_is_uploaded_to_a_private_repository(
    run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    with hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        for name, options in (("student", []), ("open", ["--public"])):
            arguments = [str(run), "--to", str(tmp_path / name), "--push-to-hub", f"me/{name}", *options]
            assert main(["export", *arguments]) == 0
            assert f"On the hub: {server.url}/me/{name}" in capsys.readouterr().out
    assert server.tokens == {"Bearer hf_of_me"}
    is_private, files = server.repositories["me/student"]
    assert is_private
    assert not server.repositories["me/open"][0]
    local = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert files == local
    assert b'.from_pretrained("me/student")' in files["README.md"]

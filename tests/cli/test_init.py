"""`distillkit init`: a folder that runs as it is, from there to a served student."""

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.cli.main import main
from distillkit.config import packaged
from distillkit.config.files import load
from distillkit.config.methods import methods
from distillkit.workflows.starter import write_starter

METHODS = [method.name for method in methods() if method.address.startswith(packaged.PREFIX)]


def test_from_an_empty_folder_to_a_served_student(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "demo", "--tiny"]) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert commands[0] == "cd demo"
    monkeypatch.chdir("demo")
    for command in commands[1:]:
        verb, *arguments = command.partition("#")[0].split()[1:]
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
        assert main([verb, *arguments]) == 0, command
    assert [verb.split()[1] for verb in commands[1:]] == ["fit", "export", "chat"]
    tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
    assert model.generate(**tokenizer("Hi", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    assert Path("runs/demo/export/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert str(tmp_path) not in Path("out/README.md").read_text()
    steps = Path("README.md").read_text().partition("```bash\n")[2].partition("```")[0].splitlines()
    assert steps == [command.partition("#")[0].strip() for command in commands[1:]]


def test_a_folder_with_files_and_an_unknown_method_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["init", str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "new"), "--method", "gdk"]) == 1
    assert "There is no method named 'gdk'. Did you mean gkd?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_current_folder_is_the_default(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["init", "--tiny"]) == 0
    assert (folder / "run.yaml").exists()
    assert "  cd " not in capsys.readouterr().out
    assert load("run.yaml")["trainer"]["default_root_dir"] == f"{folder}/runs/here"


def test_the_real_models_are_those_of_the_quickstart_with_its_settings(tmp_path: Path) -> None:
    write_starter(tmp_path / "demo")
    ours, theirs = load(tmp_path / "demo" / "run.yaml"), load("distillkit:quickstart.yaml")
    for key in ("teacher", "student", "answers", "generator", "optimizer"):
        assert ours["model"][key] == theirs["model"][key], key
    assert ours["data"]["system"] == theirs["data"]["system"]
    for split in ("train", "val"):
        assert Path(ours["data"][split]).read_bytes() == Path(theirs["data"][split]).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_own_curator_and_prompts_that_it_can_use(method: str, tmp_path: Path) -> None:
    write_starter(tmp_path / "demo", tiny=True, method=method)
    text = (tmp_path / "demo" / "run.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 150
    ours, theirs = load(tmp_path / "demo" / "run.yaml")["model"], load(f"distillkit:methods/{method}.yaml")["model"]
    assert ours["loss"] == theirs["loss"]
    curator = yaml.safe_dump(ours["curator"]).replace("max_new_tokens: 8", "").replace("sampling:", "")
    assert ours["curator"]["class_path"] == theirs["curator"]["class_path"], curator
    if "Dataset" not in curator:
        assert "max_new_tokens: 8" in yaml.safe_dump(ours["curator"])
    write_starter(tmp_path / "real", method=method)
    has_responses = '"response"' in (tmp_path / "real" / "prompts" / "train.jsonl").read_text()
    assert has_responses == ("DatasetCurator" in yaml.safe_dump(theirs["curator"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_as_it_is(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "demo", "--tiny", "--method", method]) == 0
    assert main(["fit", "--config", "demo/run.yaml", "--trainer.max_epochs", "1"]) == 0
    assert (tmp_path / "demo" / "runs" / "demo" / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_the_real_models_run_as_they_are(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "demo"]) == 0
    monkeypatch.chdir("demo")
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]) == 0
    assert main(["export", "runs/demo", "--to", "out"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    assert main(["chat", "out", "--max-new-tokens", "4"]) == 0
    answers = capsys.readouterr().out
    assert "student: " in answers
    assert "teacher: The capital of France" in answers, "the card names the file in the wheel"
    card = Path("out/README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 26

"""Help: each verb's on one screen and true, that of each installed part by its short name, and that of every key."""

import inspect
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

from distillkit import callbacks, registry
from distillkit.cli import help_pages
from distillkit.cli.main import VERBS, main
from distillkit.config import files, part_help
from distillkit.workflows.curation import CurationTrainer
from distillkit.workflows.evaluation import EvaluationTrainer
from helpers.docs import ROOT

METHODS = {
    "fit": Trainer.fit,
    "validate": Trainer.validate,
    "test": Trainer.test,
    "curate": CurationTrainer.curate,
    "evaluate": EvaluationTrainer.evaluate,
}
PARTS = [(entry.kind, entry.name) for entry in registry.entries()] + [
    ("callback", name) for name in part_help.CALLBACKS
]
KEYS = {"loss": "model.loss", "teacher": "model.teacher", "curator": "model.curator", "generator": "model.generator"}
KEYS |= {"verifier": "model.metrics", "source": "data.train", "callback": "trainer.callbacks"}


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_fits_on_a_screen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with nullcontext() if verb in help_pages.PAGES else pytest.raises(SystemExit, match="0"):
        assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: distillkit {verb}")
    assert 5 < len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", help_pages.PAGES)
def test_a_page_has_every_option_of_its_verb_with_its_default(verb: str) -> None:
    page = help_pages.PAGES[verb]
    shown = {row[0].split()[0].removeprefix("--").partition(".")[0]: row[1] for row in page.options}
    parameters = inspect.signature(METHODS[verb]).parameters
    for name, parameter in parameters.items():
        if name not in {"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}:
            words = {"None": "none", "True": "true", "False": "false"}
            assert shown.pop(name) == words.get(str(parameter.default), str(parameter.default)), name
    assert shown.keys() == {"config", "method", "print_config"} | ({"run", "student"} if verb == "evaluate" else set())


def test_the_keys_of_the_pages_have_these_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--model.student.source=x", "--model.loss=ForwardKL", "--data.train=x"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *required, "--model.teacher=TransformersTeacher", "--model.teacher.source=x", "--print_config"])
    defaults = yaml.safe_load(capsys.readouterr().out)
    words = {"none": None, "all": None, "32-true": None, "DatasetCurator": None}
    rows = {row[0]: row for page in help_pages.PAGES.values() for row in page.keys}
    assert len(rows) > 12
    for key, default, text in rows.values():
        value = value_at(defaults, key)
        if default != "required" and key != "model.teacher":
            assert value == (words[default] if default in words else yaml.safe_load(default)), key
        base = text.partition("base.yaml: ")[2]
        assert not base or value_at(files.load("distillkit:base.yaml"), key) == yaml.safe_load(base)


def value_at(config: object, key: str) -> object:
    """The value of a key as users write it, without `init_args`."""
    for name in key.split("."):
        assert isinstance(config, dict), key
        config = config[name] if name in config else config["init_args"][name]
    return config


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_installed_part_explains_its_settings_by_its_short_name(
    kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = KEYS.get(kind, kind)
    assert main(["fit", f"--{key}.help", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}, a {kind} (")
    part = part_help.find(kind, name)
    for setting in inspect.signature(part).parameters.values():
        if setting.kind is setting.POSITIONAL_OR_KEYWORD:
            assert f"\n  {setting.name}: " in text
            assert f"{setting.name}: typing" not in text
    assert "class '" not in text


def test_there_are_parts_of_every_kind() -> None:
    assert {kind for kind, _ in PARTS} == {*registry.KINDS, "callback"}
    assert all(getattr(callbacks, name) for name in part_help.CALLBACKS)


@pytest.mark.parametrize("kind", [*registry.KINDS, "callback"])
def test_without_a_name_the_parts_of_a_kind_are_listed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"--{KEYS.get(kind, kind)}.help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {name for part_kind, name in PARTS if part_kind == kind}
    assert {line.split()[0] for line in lines[: len(expected)]} == expected
    assert registry.NO_SOURCE not in "".join(lines)
    assert max(map(len, lines)) <= 80


def test_a_schedule_is_explained_at_the_setting_that_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.loss.beta.help=Linear"]) == 0
    assert "\n  until: number, default 1.0\n      Share of the" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.loss.help", "SkewLK"], "No installed loss is named 'SkewLK'. Similar names: SkewKL"),
        (["--model.loss.help", "Linear"], "No installed loss is named 'Linear'. There is a schedule with that name"),
        (["--model.los.help"], "unknown key model.los. Did you mean model.loss?"),
        (["--model.curater.help", "StudentCurator"], "unknown key model.curater. Did you mean model.curator?"),
        (["--help.modle"], "There is no help on 'modle'. Use one of --help.model, --help.data"),
        (["--trainer.callbacks.help", "Nope"], "trainer.callbacks takes no class named 'Nope'"),
    ],
)
def test_help_on_nothing_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"distillkit fit: error: {message}")
    assert error.count("\n") == 1


def test_a_section_has_its_keys_alone_and_public_classes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help.model"])
    text = capsys.readouterr().out
    assert "--model.added_tokens" in text
    assert "--trainer." not in text
    assert "--data." not in text
    names = " ".join(text.split()).replace("- ", "-")
    installed = {name for kind, name in PARTS if kind in ("loss", "teacher", "curator", "generator", "verifier")}
    assert {name for name in installed if f".{name}" not in names} == set()
    assert not any(name in text for name in ("SampledCurator", "StoredGenerator"))


def test_all_keys_come_after_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help.all"])
    text = capsys.readouterr().out
    assert text.index("--run FOLDER") < text.index("--trainer.max_epochs") < text.rindex("--lm_eval ")
    assert not any(name in text for name in ("RunTensorBoardLogger", "SignalCallback"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins"], ["methods"], ["fit", "--help"], ["compare", "--help"]]
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""if True:
        import runpy, sys
        sys.argv = ["distillkit", *{arguments}]
        try:
            runpy.run_module("distillkit", run_name="__main__")
        finally:
            print(*sys.modules, file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout
    assert {"torch", "lightning", "transformers", "jsonargparse"}.isdisjoint(done.stderr.split())


def test_a_verb_without_arguments_says_what_must_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("distillkit fit: error: model.student, model.loss, data.train must be set")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["methods"], ["fit", "--help"]])
def test_an_output_that_nobody_reads_on_ends_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distillkit", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")

"""Ctrl-C and SIGTERM: each verb says in two lines what is saved and the command to go on."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import VERBS, main
from distillkit.cli.stoppable import run_stoppable
from distillkit.config.files import load
from distillkit.workflows.starter import write_starter
from distillkit.workflows.stopped import saved_work
from helpers.runs import finish, logged_in, process, write_config


def stopped(signum: int) -> Any:
    """A verb that a signal stops at once."""

    def run(verb: str, arguments: list[str]) -> int:
        os.kill(os.getpid(), signum)
        time.sleep(5)  # the handler raises here
        return 0

    return run


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_each_verb_ends_in_two_lines_and_with_the_status_of_the_signal(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for signum, status, name in ((signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")):
        assert run_stoppable(stopped(signum), verb, ["--config", "my run.yaml"]) == status
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith(f"distillkit {verb}: stopped by {name}. ")
        assert second.partition(" with: ")[2] == f"distillkit {verb} --config 'my run.yaml'"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "a.yaml"], "--config a.yaml --ckpt_path last"),
        (["--ckpt_path", "x.ckpt", "--config", "a.yaml"], "--config a.yaml --ckpt_path last"),
        (["--ckpt_path=x.ckpt", "-c", "a.yaml"], "-c a.yaml --ckpt_path last"),
    ],
)
def test_a_run_with_a_folder_goes_on_from_its_newest_checkpoint(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for index, name in enumerate(("step=0000010.ckpt", "step=0000002.ckpt")):
        (folder / "checkpoints" / name).touch()
        os.utime(folder / "checkpoints" / name, (index, index))
    (folder / "checkpoints" / "last.ckpt").symlink_to("step=0000002.ckpt")
    (folder / "config.yaml").touch()

    def run(verb: str, arguments: list[str]) -> int:
        with saved_work(folder, folder / "responses", verb):
            return stopped(signal.SIGINT)(verb, arguments)

    assert run_stoppable(run, "fit", arguments) == 130
    assert capsys.readouterr().err.splitlines() == [
        "distillkit fit: stopped by Ctrl-C. Saved: the checkpoint run/checkpoints/step=0000002.ckpt.",
        f"Go on with: distillkit fit {expected}",
    ]
    assert run_stoppable(run, "validate", arguments) == 130
    assert capsys.readouterr().err.splitlines() == [
        "distillkit validate: stopped by Ctrl-C. Nothing was saved.",
        f"Start again with: {shlex.join(['distillkit', 'validate', *arguments])}",
    ]


@pytest.mark.parametrize("address", ["{}", "file://{}", "memory://{}"])
def test_responses_are_said_to_be_saved_where_there_are_some(address: str, tmp_path: Path, capsys: Any) -> None:
    store = address.format(tmp_path / "responses")

    def run(verb: str, arguments: list[str]) -> int:
        with saved_work(tmp_path / "run", store, verb):
            return stopped(signal.SIGTERM)(verb, arguments)

    assert run_stoppable(run, "curate", []) == 143
    empty = "Nothing was saved." if "memory" not in address else f"Saved: the responses received so far in {store}."
    assert capsys.readouterr().err.splitlines()[0] == f"distillkit curate: stopped by SIGTERM. {empty}"
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "manifest-00000-00000.json").touch()
    assert run_stoppable(run, "curate", []) == 143
    assert capsys.readouterr().err.splitlines()[0].startswith("distillkit curate: stopped by SIGTERM. Saved: the resp")


def test_an_export_that_is_stopped_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_starter(tmp_path / "demo", tiny=True)
    assert main(["fit", "--config", str(tmp_path / "demo" / "run.yaml"), "--trainer.max_steps", "1"]) == 0
    capsys.readouterr()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    arguments = ["export", str(tmp_path / "demo" / "runs" / "demo"), "--to", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "distillkit export: stopped by Ctrl-C. Nothing was saved.",
        f"Start again with: {shlex.join(['distillkit', *arguments])}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert main(arguments) == 0


def test_the_command_that_it_prints_goes_on(tmp_path: Path) -> None:
    demo, log = tmp_path / "demo", tmp_path / "log.txt"
    write_starter(demo, tiny=True)
    stop = {"class_path": "helpers.killed.KillAfterStep", "init_args": {"step": 3, "signum": int(signal.SIGINT)}}
    callbacks = [*load(demo / "run.yaml")["trainer"]["callbacks"], stop]
    write_config(demo / "stop.yaml", {"trainer": {"callbacks": callbacks, "max_epochs": 1}})
    run, arguments = demo / "runs" / "demo", ["fit", "--config", "run.yaml", "--config", "stop.yaml"]
    log.touch()
    with process(logged_in, str(demo), str(log), arguments) as child:
        assert finish(child) == 130
    *_, saved, line = log.read_text().splitlines()
    assert saved == (
        "distillkit fit: stopped by Ctrl-C. Saved: the checkpoint runs/demo/checkpoints/step=0000004.ckpt and the "
        "responses in runs/demo/responses."
    )
    assert line == f"Go on with: distillkit {' '.join(arguments)} --ckpt_path last"
    assert not (run / "export").exists()
    with process(logged_in, str(demo), str(log), shlex.split(line)[4:]) as child:
        assert finish(child) == 0
    assert (run / "export" / "model.safetensors").exists()
    assert "Traceback" not in log.read_text()


def test_a_signal_within_an_import_waits_for_its_end(tmp_path: Path, monkeypatch: Any) -> None:
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nDONE = True\n"
    (tmp_path / "slow_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def run(verb: str, arguments: list[str]) -> int:
        module = importlib.import_module("slow_module")
        assert module.DONE
        time.sleep(5)  # the repeated signal raises here
        return 0

    assert run_stoppable(run, "fit", []) == 130
    assert "slow_module" in sys.modules


def test_the_command_starts_without_anything_heavy() -> None:
    """Ctrl-C can be answered from the moment that the handlers are installed, so little may be imported before."""
    code = "import runpy, sys; sys.argv = ['x', '--version']; runpy.run_module('distillkit', run_name='__main__')"
    code = f"try:\n    {code.replace('; ', chr(10) + '    ')}\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert {"torch", "lightning", "transformers", "yaml"}.isdisjoint(done.stdout.split())
    assert "distillkit.cli.main" in done.stdout.split()

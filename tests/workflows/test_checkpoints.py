"""`last`, `best` and paths of checkpoints, and jobs that SLURM queues again."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.cli.main import main
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import CrossEntropy
from helpers.runs import QUIET, command, finish, process, save_models, write_config, write_prompts
from helpers.servers import closed_port

BEST = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/nll", "filename": "best"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def arguments(folder: Path, root: Path, verb: str, *more: str, **trainer: Any) -> list[str]:
    """A run of two epochs whose second one makes the student worse."""
    options = {"default_root_dir": str(root), "max_epochs": 2, "logger": False, "num_sanity_val_steps": 0}
    options |= {"callbacks": [{"class_path": "RunCheckpoint"}, {"class_path": "Export"}]}
    config = {
        "trainer": QUIET | options | trainer,
        "model": {
            "student": {"source": str(folder / "student")},
            "loss": {"class_path": "CrossEntropy"},
            "answers": {"temperature": 0.0, "max_new_tokens": 2},
            "generator": {"class_path": "TransformersGenerator", "init_args": {"progress": False}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}},
        },
        "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "train.jsonl"), "batch_size": 2},
    }
    return [verb, "--config", write_config(root.parent / f"{root.name}.yaml", config), *more]


@pytest.mark.parametrize("verb", ["validate", "test", "evaluate"])
@pytest.mark.parametrize("name", ["last", "best", "missing.ckpt"])
def test_a_checkpoint_that_is_not_there_is_an_error(
    verb: str, name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "run", verb, "--ckpt_path", name)) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    words = {"last": "has no checkpoint", "best": "needs a callback that says which", "missing.ckpt": "no such file"}
    assert line.startswith(f"distillkit {verb}: error: --ckpt_path {name}")
    assert words[name] in line


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "evaluate"])
@pytest.mark.parametrize("settings", [[], ["--weights_only=false"]])
def test_code_in_a_checkpoint_is_not_run(
    verb: str, settings: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if settings and verb == "evaluate":
        pytest.skip("it has no such setting")
    torch.save({"state_dict": Code(str(tmp_path / "ran"))}, tmp_path / "shared.ckpt")
    path = ["--ckpt_path", str(tmp_path / "shared.ckpt")]
    assert main(arguments(folder, tmp_path / "run", verb, *path, *settings)) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert ("DISTILLKIT_ALLOW=pickle" if settings else "contains more than tensors and plain data") in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "evaluate"])
def test_no_checkpoint_is_taken_from_the_web(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{closed_port()}/shared.ckpt"
    assert main(arguments(folder, tmp_path / "run", verb, "--ckpt_path", url)) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert (
        line
        == f"distillkit {verb}: error: --ckpt_path {url} is an address: download the checkpoint, and name the file."
    )


@pytest.mark.parametrize("callbacks", [["RunCheckpoint", BEST], [BEST, "RunCheckpoint"]])
def test_best_is_the_best_whichever_callback_comes_first(callbacks: list[Any], folder: Path, tmp_path: Path) -> None:
    parts = [part if isinstance(part, dict) else {"class_path": part} for part in callbacks]
    monitor = next(part for part in parts if "init_args" in part)
    monitor["init_args"]["dirpath"] = str(tmp_path / "best")
    run = arguments(folder, tmp_path / "run", "fit", callbacks=[*parts, {"class_path": "helpers.killed.Spoil"}])
    assert main(run) == 0
    last, best = (torch.load(path) for path in (tmp_path / "run/checkpoints/last.ckpt", tmp_path / "best/best.ckpt"))
    assert (last["global_step"], best["global_step"]) == (4, 2)
    from distillkit.workflows import launch

    figures = {}
    for name in ("last", "best"):
        again = arguments(folder, tmp_path / "run", "validate", "--ckpt_path", name, callbacks=parts)
        cli = launch.launch(launch.DistillCLI, "validate", again[1:])
        figures[name] = cli.model.history[-1]
    assert figures["best"]["step"] == 2
    assert figures["best"]["val/nll"] < figures["last"]["val/nll"]


@pytest.mark.parametrize("first", [True, False])
def test_best_in_python(first: bool, folder: Path, tmp_path: Path) -> None:
    monitor = ModelCheckpoint(tmp_path / "best", "best", monitor="val/nll", mode="max")  # that before training
    callbacks = [RunCheckpoint(), monitor] if first else [monitor, RunCheckpoint()]
    options = {"default_root_dir": tmp_path, "max_epochs": 3, "logger": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(**QUIET | options, callbacks=callbacks)
    module = DistillModule(
        Student(str(folder / "student")),
        CrossEntropy(),
        generator=TransformersGenerator(progress=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        answers=Sampling(temperature=0.0, max_new_tokens=2),
    )
    data = DistillData(str(folder / "train.jsonl"), str(folder / "train.jsonl"), batch_size=2)
    trainer.fit(module, data)
    assert trainer.checkpoint_callback is monitor
    worst = max(row["val/nll"] for row in module.history)
    with pytest.warns(UserWarning, match="multiple `ModelCheckpoint`"):
        trainer.validate(module, data, ckpt_path="best", verbose=False)
    assert module.history[-1]["val/nll"] == pytest.approx(worst, rel=1e-6)


def job(folder: Path, root: Path, *callbacks: Any, at: int = 0) -> list[str]:
    """A run whose optimizer can be interrupted."""
    parts = [*callbacks, {"class_path": "RunCheckpoint"}, {"class_path": "Export"}]
    optimizer = [
        "--model.optimizer=helpers.killed.InterruptedSGD",
        "--model.optimizer.lr=0.3",
        f"--model.optimizer.at={at}",
        "--data.batch_size=1",  # two steps in an epoch, at whose end RunCheckpoint saves
    ]
    return arguments(folder, root, "fit", *optimizer, max_epochs=3, accumulate_grad_batches=2, callbacks=parts)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "step"])
def test_a_job_that_slurm_queues_again_goes_on_by_the_same_command(hook: str, folder: Path, tmp_path: Path) -> None:
    assert command(job(folder, tmp_path / "alone")) == 0
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    names = {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in names.items()}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    killer = {"class_path": "helpers.killed.Requeued", "init_args": {"batch": 2, "hook": hook}}
    with process(main, job(folder, tmp_path / "job", killer, at=1 if hook == "step" else 0), env=environment) as child:
        assert finish(child) == -signal.SIGKILL
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]
    assert (tmp_path / "job" / "hpc_ckpt_1.ckpt").exists()
    with process(main, job(folder, tmp_path / "job"), env=environment) as child:
        assert finish(child) == 0
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("job", "alone"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_outside_of_a_job_a_folder_with_a_run_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "hpc_ckpt_1.ckpt").write_text("")
    assert main(arguments(folder, tmp_path / "run", "fit")) == 1
    assert "contains a run already" in capsys.readouterr().err

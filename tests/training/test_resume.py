"""A run that was killed and resumed = the run that was left alone, bit for bit."""

import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from distillkit.cli.main import main
from distillkit.run_folder import read_metrics
from distillkit.storage.responses import ResponseStore
from helpers.runs import QUIET, command, finish, logged, on_two_ranks, process, save_models, write_config, write_prompts

PROMPTS, HELD_OUT = 10, 3
STEPS = 9
"""Three epochs of steps of 4, 4 and 2 prompts, each in micro-batches of 2."""

CASES: dict[str, dict[str, Any]] = {
    "a round an epoch": {"rounds": "epoch"},
    "a round every two steps": {"rounds": {"every": 2}},
    "dropout": {"rounds": "epoch", "lora": {"r": 4, "dropout": 0.5}},
    "replay and mixing by schedule": {"rounds": {"every": 2}, "replay": True},
    "written ahead": {"rounds": {"every": 2}, "replay": True, "overlap": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS)
    write_prompts(root / "val.jsonl", HELD_OUT)
    return root


def config(folder: Path, run: str, rounds: Any, lora: Any = None, every: int | None = 2, **more: Any) -> dict[str, Any]:
    """A small DistiLLM-2 run into `run`."""
    sampling = {"max_new_tokens": 6}
    pair = part(
        "PairedCurator",
        chosen=part("TeacherCurator", sampling=sampling),
        rejected=part("StudentCurator", sampling=sampling, rounds=rounds),
    )
    return {
        "trainer": QUIET
        | {
            "default_root_dir": str(folder / run),
            "max_epochs": more.get("epochs", 3),
            "accumulate_grad_batches": 2,
            "callbacks": [part("RunCheckpoint", every_n_steps=every), part("Export"), *more.get("callbacks", [])],
        },
        "model": {
            "student": {"source": str(folder / "student"), "lora": lora},
            "teacher": part("TransformersTeacher", source=str(folder / "teacher"), dtype="float32"),
            "loss": part("DistiLLM2", alpha=part("AdaptiveAlpha", warmup_steps=5)),
            "curator": _replayed(pair, rounds) if more.get("replay") else pair,
            "generator": more.get("generator", part("TransformersGenerator", progress=False)),
            "optimizer": part("torch.optim.AdamW", lr=1e-3),
            "answers": {"temperature": 0.0, "max_new_tokens": 6},
            "overlap": more.get("overlap", False),
        },
        "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "batch_size": 2},
    }


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


def _replayed(pair: dict[str, Any], rounds: Any) -> dict[str, Any]:
    """Pairs of which some are replayed; the teacher's half comes from two samples of it, some of which are refused."""
    once = pair["init_args"]["chosen"]
    anew = part("TeacherCurator", sampling={"max_new_tokens": 5}, rounds=rounds)
    chosen = part("MixedCurator", parts=[once, anew], shares=part("Linear", start=0.2, end=0.9))
    mixed = part("PairedCurator", chosen=chosen, rejected=pair["init_args"]["rejected"])
    filtered = part("FilteredCurator", curator=mixed, filters=["Empty", part("Repeated", ngram=2)])
    return part("ReplayCurator", curator=filtered, replay=part("Linear", start=0.3, end=0.9), capacity=5)


def start(folder: Path, run: str, settings: dict[str, Any], *arguments: str) -> list[str]:
    """The arguments of the command for a run with these settings."""
    folder.joinpath(run).mkdir(exist_ok=True)
    return ["fit", "--config", write_config(folder / f"{run}.yaml", config(folder, run, **settings)), *arguments]


def kill_and_resume(folder: Path, run: str, settings: dict[str, Any], killer: dict[str, Any]) -> Path:
    """Runs until `killer` strikes, then resumes; the run's folder."""
    assert command(start(folder, run, settings | killer)) == -signal.SIGKILL
    assert not (folder / run / "export").exists()
    assert command(start(folder, run, settings, "--ckpt_path", "last")) == 0
    return folder / run


def after_step(step: int, signum: int = signal.SIGKILL) -> dict[str, Any]:
    return {"callbacks": [part("helpers.killed.KillAfterStep", step=step, signum=int(signum))]}


@pytest.fixture(scope="module")
def left_alone(folder: Path) -> Callable[[str], Path]:
    """The folder of the uninterrupted run of a case."""

    def run(case: str) -> Path:
        name = f"{case} left alone"
        if not (folder / name).exists():
            assert command(start(folder, name, CASES[case])) == 0
        return folder / name

    return run


def responses(run: Path) -> Counter[tuple[str, str]]:
    """How often the store holds a response, by provenance key and prompt id."""
    found: Counter[tuple[str, str]] = Counter()
    for shard in ResponseStore(run / "responses").shards():
        with pa.memory_map(str(run / "responses" / shard["file"])) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        found.update((shard["key"], row["prompt_id"]) for row in rows)
    return found


def assert_equal(found: Any, expected: Any, place: str = "") -> None:
    """Compares nested containers, tensors bit by bit."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_equal(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_equal(ours, theirs, f"{place}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def assert_same_run(resumed: Path, alone: Path, steps: int = STEPS) -> None:
    """Exported weights, the newest checkpoint, the store and the curves."""
    assert_equal(load_file(resumed / "export" / "model.safetensors"), load_file(alone / "export" / "model.safetensors"))
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt") for run in (resumed, alone))
    assert ours["global_step"] == theirs["global_step"] == steps
    assert float(theirs["state_dict"]["loss.alpha_teacher.gap_sum"]) != 0
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "distillkit"):
        assert_equal(ours[part], theirs[part], part)
    assert set(responses(resumed).values()) == {1}
    assert responses(resumed) == responses(alone)
    names = [path.name for path in (resumed / "checkpoints").iterdir()]
    assert len(names) == 2, f"one checkpoint and the link to it, got {names}"


def assert_both_sessions_are_logged(resumed: Path, alone: Path, killed_after: int) -> None:
    logs = sorted(path.parent.name for path in resumed.glob("csv/*/metrics.csv"))
    assert logs == ["version_0", "version_1"]
    first = (resumed / "csv" / "version_0" / "metrics.csv").read_text()
    assert first.count("\n") > killed_after, "what the killed session logged is on disk"
    ours, theirs = read_metrics(resumed), read_metrics(alone)
    assert ours.keys() == theirs.keys()
    for name in ("train/loss", "train/beta", "val/kl", "train/gap_student"):
        assert len(theirs[name]) >= 3
        assert ours[name] == theirs[name], name
    assert (resumed / "curves.png").stat().st_size > 10_000
    assert "Held-out metrics" in (resumed / "export" / "README.md").read_text()


# Checkpoints are written after steps 2, 4, 6, 8 and 9. Step 6 is the last of the second epoch.
@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("a round an epoch", 5),
        pytest.param("a round an epoch", 7, marks=pytest.mark.slow),
        pytest.param("a round every two steps", 3, marks=pytest.mark.slow),
        ("a round every two steps", 5),  # from within a round
        ("dropout", 5),
        pytest.param("replay and mixing by schedule", 5, marks=pytest.mark.slow),
        pytest.param("written ahead", 3, marks=pytest.mark.slow),
        ("written ahead", 5),
    ],
)
def test_a_run_killed_in_an_epoch_ends_as_if_nothing_had_happened(
    case: str, step: int, folder: Path, left_alone: Callable[[str], Path]
) -> None:
    alone = left_alone(case)
    resumed = kill_and_resume(folder, f"{case} killed after {step}", CASES[case], after_step(step))
    assert_same_run(resumed, alone)
    assert_both_sessions_are_logged(resumed, alone, step)


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_responses_it_has(
    folder: Path, left_alone: Callable[[str], Path]
) -> None:
    case = "a round an epoch"
    # Calls: 1 teacher for validation, 2 student's answers before training, 3 teacher, 4 student.
    killer = {
        "generator": {"class_path": "helpers.killed.KilledGenerator", "init_args": {"call": 4, "progress": False}}
    }
    run = "killed in curation"
    assert command(start(folder, run, CASES[case] | killer)) == -signal.SIGKILL
    written = responses(folder / run)
    assert len(written) == PROMPTS + HELD_OUT
    shards = {path: path.stat().st_mtime_ns for path in (folder / run / "responses").rglob("*.arrow")}
    assert command(start(folder, run, CASES[case], "--ckpt_path", "last")) == 0
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in shards}.items()
    assert_same_run(folder / run, left_alone(case))


def test_a_run_killed_twice_goes_on_twice(folder: Path, left_alone: Callable[[str], Path]) -> None:
    case, run = "a round every two steps", "killed twice"
    settings = CASES[case]
    assert command(start(folder, run, settings | after_step(2))) == -signal.SIGKILL
    assert command(start(folder, run, settings | after_step(8), "--ckpt_path", "last")) == -signal.SIGKILL
    assert command(start(folder, run, settings, "--ckpt_path", "last")) == 0
    assert_same_run(folder / run, left_alone(case))


def test_a_checkpoint_at_the_end_of_an_epoch_is_resumed_too(folder: Path) -> None:
    settings = CASES["a round an epoch"] | {"every": None}
    assert command(start(folder, "by epoch", settings)) == 0
    resumed = kill_and_resume(folder, "by epoch, killed", settings, after_step(7))
    assert_same_run(resumed, folder / "by epoch")
    assert_both_sessions_are_logged(resumed, folder / "by epoch", 7)


@pytest.mark.parametrize(
    ("case", "step", "signum"),
    [
        ("a round an epoch", 4, signal.SIGTERM),  # step 5 is within the second epoch
        ("a round an epoch", 5, signal.SIGINT),  # and step 6 its last
        ("written ahead", 6, signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    case: str, step: int, signum: int, folder: Path, left_alone: Callable[[str], Path]
) -> None:
    run, settings = f"{case} stopped after {step}", CASES[case] | {"every": None}
    assert command(start(folder, run, settings | after_step(step, signum))) == 128 + signum
    assert not (folder / run / "export").exists()
    assert torch.load(folder / run / "checkpoints" / "last.ckpt")["global_step"] == step + 1
    assert command(start(folder, run, settings, "--ckpt_path", "last")) == 0
    assert_same_run(folder / run, left_alone(case))


LAST = ["--ckpt_path", "last"]


@pytest.mark.parametrize("call", [4, 5])
def test_a_signal_during_curation_ends_a_run_at_once(
    call: int, folder: Path, left_alone: Callable[[str], Path]
) -> None:
    # Calls 4 and 5 are the student's, before the first step and after the first epoch.
    case, run = "a round an epoch", f"stopped in curation {call}"
    killer = part("helpers.killed.KilledGenerator", call=call, progress=False, signum=int(signal.SIGTERM))
    log = folder / f"{run}.log"
    log.touch()
    settings = CASES[case] | {"generator": killer}
    with process(logged, str(log), start(folder, run, settings)) as child:
        assert finish(child) == 143
    *_, saved, command_line = log.read_text().splitlines()
    assert saved.startswith("distillkit fit: stopped by SIGTERM. Saved: the ")
    assert (f"{folder / run}/checkpoints/step=" in saved) == (call == 5)
    assert saved.endswith(f"the responses in {folder / run}/responses.")
    assert command_line == f"Go on with: {shlex.join(['distillkit', *start(folder, run, settings), *LAST])}"
    assert (folder / run / "checkpoints").exists() == (call == 5)
    assert command(start(folder, run, CASES[case], "--ckpt_path", "last")) == 0
    assert_same_run(folder / run, left_alone(case))


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_ends_a_validation(call: int, folder: Path) -> None:
    # Calls: 1 the teacher's references, 2 the student's answers.
    killer = part("helpers.killed.KilledGenerator", call=call, progress=False, signum=int(signal.SIGTERM))
    _, *arguments = start(folder, f"validation {call}", CASES["a round an epoch"] | {"generator": killer})
    assert command(["validate", *arguments]) == 143


@pytest.mark.slow
def test_a_signal_ends_all_ranks(folder: Path) -> None:
    devices = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1")
    settings = CASES["a round an epoch"] | after_step(2, signal.SIGTERM)
    on_two_ranks(main, start(folder, "ranks stopped", settings, *devices), status=143)


def test_a_run_that_replays_writes_less(folder: Path, left_alone: Callable[[str], Path]) -> None:
    case = "replay and mixing by schedule"
    shards = ResponseStore(left_alone(case) / "responses").shards()
    written = sum(shard["responses"] for shard in shards if shard["writer"] == "student")
    assert PROMPTS <= written < 0.9 * 3 * PROMPTS, "it would be one for each prompt in each of three epochs"
    checkpoint = torch.load(left_alone(case) / "checkpoints" / "last.ckpt")
    assert len(checkpoint["state_dict"]["curator._extra_state"]["start"]["sizes"]) == 5, "the buffer is full"


def test_what_is_written_ahead_lags_by_a_round(left_alone: Callable[[str], Path]) -> None:
    # Rounds of 2, 1, 2, 1, 2 and 1 steps, each written with the weights of the start of the one before.
    lag = read_metrics(left_alone("written ahead"))["curation/lag"]
    assert [value for _, value in lag] == [0, 0, 2, 1, 1, 2, 1, 1, 2]


@pytest.mark.slow
def test_two_ranks_resume_each_with_its_own_random_numbers(folder: Path) -> None:
    settings = CASES["dropout"] | {"every": 1}
    devices = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=1")
    on_two_ranks(main, start(folder, "ranks", settings, *devices))
    on_two_ranks(main, start(folder, "ranks killed", settings | after_step(5), *devices), status=-signal.SIGKILL)
    on_two_ranks(main, start(folder, "ranks killed", settings, *devices, "--ckpt_path", "last"))
    assert_same_run(folder / "ranks killed", folder / "ranks")
    first, second = torch.load(folder / "ranks" / "checkpoints" / "last.ckpt")["distillkit"]["random"]
    assert not torch.equal(first["cpu"], second["cpu"]), "or the test says nothing"


@pytest.mark.slow
def test_the_real_command_may_be_killed_at_any_time(folder: Path) -> None:
    settings = CASES["a round every two steps"] | {"epochs": 30}
    python = [sys.executable, "-m", "distillkit.cli.main"]
    subprocess.run([*python, *start(folder, "long", settings)], check=True)
    arguments = start(folder, "long killed", settings)
    for number, seconds in enumerate((0.0, 0.7, 1.1)):
        resume = ["--ckpt_path", "last"] if number else []
        with subprocess.Popen([*python, *arguments, *resume]) as child:
            before = checkpoint_time(folder / "long killed")
            while checkpoint_time(folder / "long killed") == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(seconds)
            assert child.poll() is None, "it ended before it could be killed: give it more epochs"
            child.kill()
    subprocess.run([*python, *arguments, "--ckpt_path", "last"], check=True)
    assert_same_run(folder / "long killed", folder / "long", steps=90)


def checkpoint_time(run: Path) -> int:
    """When the newest checkpoint was written; 0 before the first."""
    link = run / "checkpoints" / "last.ckpt"
    return link.lstat().st_mtime_ns if link.is_symlink() else 0

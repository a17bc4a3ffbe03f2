"""Comparisons of tiny models: each run is a process, which may fail or be killed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit import run_folder
from distillkit.cli.compare import run as compare
from distillkit.cli.main import main
from distillkit.comparison import plan as compare_plan
from distillkit.comparison import runner
from distillkit.comparison.statistics import paired_difference
from distillkit.storage.responses import ResponseStore
from helpers.comparisons import heed_interrupts, in_curation, in_evaluation, in_training, still_running, wait_for
from helpers.locks import locked
from helpers.packages import install, python_path, write_package
from helpers.runs import QUIET, finish, logged, process, save_models, write_prompts
from helpers.stores import stored

PROMPTS, HELD_OUT, TOKENS = 6, 4, 60
SEEDS = [0, 1]


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


PAIR = part("PairedCurator", chosen="TeacherCurator", rejected=part("StudentCurator", rounds="epoch"))
METHODS: dict[str, Any] = {
    "kd": {"model": {"loss": "ForwardKL", "curator": "TeacherCurator"}},
    "contrastive": {"model": {"loss": "DistiLLM2", "curator": PAIR}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_models(tmp_path)
    write_prompts(tmp_path / "train.jsonl", PROMPTS)
    write_prompts(tmp_path / "val.jsonl", HELD_OUT)
    return tmp_path


def write(folder: Path, name: str = "compare", **changed: Any) -> str:
    """Writes a comparison; gives its file."""
    content = {
        "out": str(folder / "out"),
        "seeds": SEEDS,
        "budget": {"tokens": TOKENS},
        "sampling": {"max_new_tokens": 5},
        "common": {
            "trainer": {key: QUIET[key] for key in ("enable_model_summary", "accelerator")},
            "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "batch_size": 2},
            "model": {
                "student": {"source": str(folder / "student")},
                "teacher": part("TransformersTeacher", source=str(folder / "teacher"), dtype="float32"),
                "generator": part("TransformersGenerator", progress=False),
                "answers": {"temperature": 0.0, "max_new_tokens": 5},
                "optimizer": part("torch.optim.AdamW", lr=1e-2),
            },
        },
        "methods": METHODS,
    } | changed
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return str(path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was run. Processes are forked from a warm one, where the real ones start anew: the rest is the same."""
    run: list[tuple[str, ...]] = []
    # A thread that starts a process with multiprocessing looks at the others' ends, and takes their exit status away.
    one_at_a_time = threading.Lock()

    def warm(self: Any, own: compare_plan.Run, gpu: int | None, *arguments: str) -> int:
        run.append((arguments[0], own.method, str(own.seed)))
        log = own.folder / run_folder.LOG
        log.open("a").close()
        with one_at_a_time, process(logged, str(log), list(arguments)) as child:
            return finish(child)

    monkeypatch.setattr(runner.Runner, "_run_command", warm)
    return run


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(method for method in found["methods"] if method["name"] == name)


def test_a_comparison_with_a_method_that_fails_is_whole_and_goes_on(
    folder: Path, commands: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"model": {"loss": part("helpers.diverging.Diverging", step=2), "curator": "TeacherCurator"}}
    config = write(folder, methods=METHODS | {"broken": broken}, title="Three methods", slots=2)
    assert compare(["--config", config]) == 1, "one method failed"
    printed = capsys.readouterr().out
    assert re.search(r"\[6/6\]", printed)
    assert "broken, seed 1: failed: " in printed
    assert printed.rstrip().endswith(f"The report is {folder / 'out' / 'report.html'}.")

    found = results(folder)
    assert of(found, "broken")["runs"] == {"0": "failed", "1": "failed"}
    assert "The loss was nan in step 3 on rank 0" in of(found, "broken")["errors"]["0"]
    for name in METHODS:
        own = of(found, name)
        assert own["runs"] == {"0": "done", "1": "done"}
        values = [evaluation(folder, name, seed)["metrics"]["kl"] for seed in SEEDS]
        assert own["metrics"]["kl"]["values"] == values
        assert own["metrics"]["kl"]["mean"] == pytest.approx(sum(values) / 2)
        assert TOKENS <= own["cost"]["spent_tokens"] < TOKENS + 2 * 2 * 5, "a batch more, at most"
    assert of(found, "contrastive")["metrics"]["kl"]["difference"] == pytest.approx(by_hand(folder))
    for name in ("report.html", "report.md"):
        text = (folder / "out" / name).read_text()
        assert "Three methods" in text
        assert "The loss was nan" in text
    with (folder / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["status"]) for row in rows] == [
        (name, str(seed), "failed" if name == "broken" else "done") for name in (*METHODS, "broken") for seed in SEEDS
    ]
    assert float(rows[0]["kl"]) == evaluation(folder, "kd", 0)["metrics"]["kl"]
    with (folder / "out" / "curves.csv").open(newline="") as file:
        points = [row for row in csv.DictReader(file) if (row["method"], row["name"]) == ("contrastive", "val/kl")]
    assert float(points[0]["tokens"]) == 0
    assert float(points[-1]["value"]) != float(points[0]["value"])

    # The teacher's responses were written once, before the runs; a run wrote nothing but its student's.
    assert [own for own in commands if own[0] == "curate"] == [("curate", "kd", "0"), ("curate", "kd", "1")]
    for name in METHODS:
        for seed in SEEDS:
            usage = json.loads((folder / "out" / "runs" / name / f"seed-{seed}" / "usage.json").read_text())
            assert usage["written_tokens"].keys() <= {"student"}
            assert (usage["written_tokens"] != {}) == (name == "contrastive")
    assert not list((folder / "out" / "runs").glob("*/*/responses"))
    # It goes on: with a method more, nothing that is there runs again; what failed does if it is told to.
    commands.clear()
    more = {"more": {"model": {"loss": "ReverseKL", "curator": "TeacherCurator"}}}
    config = write(folder, methods=METHODS | {"broken": broken} | more, title="Three methods")
    assert compare(["--config", config]) == 1
    assert [own for own in commands if own[0] != "curate"] == [
        (verb, "more", str(seed)) for seed in SEEDS for verb in ("fit", "evaluate")
    ]
    commands.clear()
    assert compare(["--config", config, "--retry"]) == 1
    assert {own[1] for own in commands} == {"broken"}
    assert {own[0] for own in commands} == {"fit"}
    before = results(folder)["methods"]
    commands.clear()
    assert compare(["--config", config, "--report"]) == 1
    assert commands == []
    assert results(folder)["methods"] == before

    # A configuration that is another one is not mixed with what is there.
    config = write(folder, budget={"tokens": 2 * TOKENS})
    capsys.readouterr()
    assert main(["compare", "--config", config]) == 1
    error = capsys.readouterr().err
    assert "kd, seed 0, was started with a different configuration (trainer.callbacks)" in error
    assert f"Remove {folder / 'out' / 'runs' / 'kd' / 'seed-0'}, or choose another folder with --out" in error


def evaluation(folder: Path, method: str, seed: int) -> dict[str, Any]:
    path = folder / "out" / "runs" / method / f"seed-{seed}" / "evaluation" / "evaluation.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def by_hand(folder: Path) -> dict[str, Any]:
    """The difference of contrastive from kd, from the lines of their answers."""
    import numpy as np

    values: dict[str, list[list[float]]] = {"kd": [], "contrastive": []}
    weights: list[float] = []
    for name, rows in values.items():
        for seed in SEEDS:
            path = folder / "out" / "runs" / name / f"seed-{seed}" / "evaluation" / "answers.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            rows.append([line["metrics"]["kl"] for line in lines])
            weights = [line["positions"] for line in lines]
    found = paired_difference(np.array(values["contrastive"]), np.array(values["kd"]), np.array(weights, dtype=float))
    means = [sum(w * d for w, d in zip(weights, row, strict=True)) / sum(weights) for row in values["contrastive"]]
    others = [sum(w * d for w, d in zip(weights, row, strict=True)) / sum(weights) for row in values["kd"]]
    assert found.mean == pytest.approx((sum(means) - sum(others)) / 2)
    return vars(found) | {"sure": found.is_sure}


def test_all_methods_begin_with_the_student_of_the_warm_start(folder: Path, commands: list[tuple[str, ...]]) -> None:
    warm = METHODS["kd"] | {"budget": {"steps": 4}}
    config = write(folder, seeds=[0], warm_start=warm, budget={"steps": 1}, methods={"kd": METHODS["kd"]})
    assert compare(["--config", config]) == 0
    assert [own[:2] for own in commands] == [("fit", "warm start"), ("fit", "kd"), ("evaluate", "kd")]
    log = (folder / "out" / "warm-start" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    curve = (folder / "out" / "runs" / "kd" / "seed-0" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    kls = [[float(row["val/kl"]) for row in csv.DictReader(lines) if row["val/kl"]] for lines in (log, curve)]
    assert kls[1][0] == pytest.approx(kls[0][-1], rel=1e-5)
    assert kls[0][0] != pytest.approx(kls[0][-1], rel=1e-3)
    assert "trained before by a warm start of 4 steps" in (folder / "out" / "report.md").read_text()
    commands.clear()
    assert compare(["--config", config]) == 0
    assert commands == []


def test_where_time_is_the_budget_each_run_writes_its_own(folder: Path, commands: list[tuple[str, ...]]) -> None:
    config = write(folder, seeds=[0], budget={"seconds": 0.5}, keep=True)
    assert compare(["--config", config]) == 0
    assert [own[0] for own in commands] == ["fit", "evaluate"] * 2
    for name in METHODS:
        place = folder / "out" / "runs" / name / "seed-0"
        assert ResponseStore(place / "responses").shards()
        usage = json.loads((place / "usage.json").read_text())
        assert usage["written_tokens"]["teacher"] > 0
        assert usage["spent_seconds"] >= 0.5
        assert (place / "export" / "model.safetensors").exists()
        assert (place / "checkpoints" / "last.ckpt").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"budgets": {"tokens": 3}}, "unknown key budgets. Did you mean budget?"),
    ({"out": None}, "the required key out is missing"),
    ({"methods": {}}, "methods must map names to configurations, got {}"),
    ({"methods": {"a/b": {}}}, "'a/b' can't be the name of a method, because it also names a folder"),
    ({"methods": {"kd": 3}}, "methods.kd must be a configuration or the path of one, got 3"),
    ({"methods": {"kd": "nothing.yaml"}}, "nothing.yaml, the base of "),
    ({"budget": {"tokens": 3, "seconds": 1}}, "budget must be exactly one of tokens, seconds, steps with an amount"),
    ({"budget": {"tokens": 0}}, "budget.tokens must be an integer above 0, got 0"),
    ({"budget": {"steps": 1.5}}, "budget.steps must be an integer above 0, got 1.5"),
    ({"seeds": [1, 1]}, "seeds must be a list of distinct integers, got [1, 1]"),
    ({"seeds": 3}, "seeds must be a list of distinct integers, got 3"),
    ({"baseline": "gkd"}, "baseline must be one of the methods (kd, contrastive), got 'gkd'"),
    ({"baseline": {"kd": 1}}, "baseline must be one of the methods (kd, contrastive), got {'kd': 1}"),
    (
        {"warm_start": {"budget": {"steps": 1}, "model": {"student": "small"}}},
        "model.student of the warm start must be a mapping of settings, got 'small'",
    ),
    ({"split": "train"}, "split must be val or test, got 'train'"),
    ({"slots": 0}, "slots must be an integer of at least 1, got 0"),
    ({"gpus": [-1]}, "gpus must be a list of GPU indices, got [-1]"),
    ({"warm_start": {}}, "warm_start.budget must be exactly one of tokens, seconds, steps"),
    ({"out": 3}, "out must be the path of a folder, got 3"),
    ({"sampling": 3}, "sampling must be a configuration or the path of one, got 3"),
    ({"methods": {"kd": {"model": None}}}, "Method kd: model must be a mapping of settings, got None"),
    ({"common": {"data": []}}, "data must be a mapping of settings, got []"),
    (
        {"methods": METHODS | {"typo": {"model": {"loss": "FowardKL"}}}},
        "compare.yaml: model.loss: No installed loss is named",
    ),
    (
        {"methods": METHODS | {"typo": {"model": {"loss": part("SkewKL", alfa=1)}}}},
        "compare.yaml: unknown key model.loss.alfa.",
    ),
    ({"methods": METHODS | {"typo": "method.yaml"}}, "method.yaml: model.loss.alpha must be a number, got x."),
    ({"methods": METHODS | {"range": {"model": {"loss": part("SkewKL", alpha=2.0)}}}}, "Method range: "),
    ({"methods": {"bare": {"model": {"curator": "PairedCurator"}}}}, "is not set, so its sampling can't be set"),
    ({"common": {"data": {"train": "nowhere.jsonl"}}}, "must be set, in a config file or on the command line"),
    ({"methods": {"kd": METHODS["kd"] | {"data": {"train": "nowhere.jsonl"}}}}, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_said_before_the_first_run(
    changed: dict[str, Any],
    message: str,
    folder: Path,
    commands: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)
    (folder / "method.yaml").write_text("model: {loss: {class_path: SkewKL, init_args: {alpha: x}}}")
    assert main(["compare", "--config", write(folder, **changed)]) == 1
    assert message in capsys.readouterr().err
    assert commands == []
    assert not (folder / "out" / "runs").exists()


def test_an_empty_key_is_as_if_it_were_not_there(folder: Path) -> None:
    keys = ("title", "warm_start", "seeds", "baseline", "sampling", "split", "slots", "gpus", "keep")
    plan = compare_plan.read(write(folder, **dict.fromkeys(keys)))
    assert (plan.seeds, plan.baseline, plan.split, plan.slots, plan.gpus, plan.keep) == (
        (0,),
        "kd",
        "val",
        1,
        (),
        False,
    )
    assert plan.warm_start is None
    method = METHODS["kd"] | {"trainer": {"callbacks": None}}
    plan = compare_plan.read(
        write(folder, methods={"kd": method}, warm_start={"model": {"student": None}, "budget": {"steps": 1}})
    )
    assert plan.warm_start is not None


def test_samplings_and_seeds_reach_every_curator(folder: Path) -> None:
    own = part("StudentCurator", rounds="step", sampling={"temperature": 1.0, "max_new_tokens": 7})
    mixed = part("MixedCurator", parts=["TeacherCurator", own, "DatasetCurator"], shares=[0.3, 0.3, 0.4])
    plan = compare_plan.read(write(folder, methods={"mixed": {"model": {"curator": mixed}}}, seeds=[3]))
    (run,) = plan.runs
    teacher, student, dataset = run.config["model"]["curator"]["init_args"]["parts"]
    assert teacher["init_args"]["sampling"] == {"max_new_tokens": 5, "seed": 3}
    assert student["init_args"]["sampling"] == {"max_new_tokens": 7, "temperature": 1.0, "seed": 3}
    assert dataset == {"class_path": "DatasetCurator"}
    assert run.config["seed_everything"] == run.config["data"]["seed"] == 3


def test_two_processes_do_not_work_on_one_comparison(
    folder: Path, commands: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(folder / "out") as pid:
        assert main(["compare", "--config", write(folder)]) == 1
    assert f"out is in use: process {pid} on " in capsys.readouterr().err
    assert commands == []


STRANGER = '''
    """A loss of a stranger."""

    from distillkit import TokenLoss


    class Hellinger(TokenLoss):
        """Squared Hellinger distance, 1 - sum sqrt(p q)."""

        def divergence(self, logp, logq):
            return 1.0 - (0.5 * (logp + logq)).exp().sum(-1)
'''


def test_a_run_that_ends_with_success_before_its_end_is_not_done(folder: Path, commands: list[tuple[str, ...]]) -> None:
    trainer = {"callbacks": [{"class_path": "helpers.killed.EndsEarly"}]}
    methods = {"early": METHODS["kd"] | {"trainer": trainer}}
    assert compare(["--config", write(folder, methods=methods, seeds=[0])]) == 1
    assert of(results(folder), "early")["errors"] == {"0": "`fit` ended without its mark fitted.json"}
    assert ("evaluate", "early", "0") not in commands


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_with_the_run_it_was_in(folder: Path) -> None:
    """The real command, in real processes, killed at several moments; one method is a package's, named in one line."""
    entry = {"hellinger_loss.py": STRANGER}
    package = write_package(folder / "source", "hellinger-loss 1.0", ["Hellinger = 'hellinger_loss:Hellinger'"], entry)
    site = install([package], folder / "site")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(site)}
    methods = METHODS | {"hellinger": {"model": {"loss": "Hellinger", "curator": "TeacherCurator"}}}

    def start(out: str) -> "subprocess.Popen[bytes]":
        config = write(folder, out, out=str(folder / out), slots=2, methods=methods, seeds=[0])
        command = [sys.executable, "-m", "distillkit.cli.main", "compare", "--config", config]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts
        )

    assert start("alone").wait(400) == 0
    for happened, stop in (
        (in_curation, signal.SIGKILL),
        (in_training, signal.SIGINT),
        (in_evaluation, signal.SIGKILL),
    ):
        child = start("killed")
        wait_for(lambda happened=happened: happened(folder / "killed"), child)
        child.send_signal(stop)
        assert child.wait() == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[stop]
        wait_for(lambda: not still_running(folder / "killed"))
    assert not list((folder / "killed").glob("**/failed.json")), "no fault of theirs"
    assert start("killed").wait(400) == 0
    ours, theirs = (json.loads((folder / out / "results.json").read_text()) for out in ("killed", "alone"))
    assert [own["metrics"] for own in ours["methods"]] == [own["metrics"] for own in theirs["methods"]]
    assert [own["runs"] for own in ours["methods"]] == [{"0": "done"}] * 3
    for one, other in zip(ours["runs"], theirs["runs"], strict=True):
        assert one["usage"]["spent_tokens"] == other["usage"]["spent_tokens"]
    shards = [stored(folder / out / "responses") for out in ("killed", "alone")]
    assert shards[0] == shards[1]

"""Runs with an empty or cut file: the report names it, and the comparison does again what it belongs to."""

import json
from pathlib import Path

import pytest

from distillkit.comparison import outcome, report
from distillkit.comparison.plan import Plan, Run
from distillkit.comparison.runner import discard_damaged, write_configs
from distillkit.errors import StoreError

FILES = {
    "usage.json": {"spent_tokens": 10},
    "fitted.json": {"wall_seconds": 2.0},
    "evaluation/evaluation.json": {"metrics": {"kl": 0.5}, "num_prompts": 2, "teacher": "t", "versions": {}},
}
ANSWER = {"prompt_id": "a", "tokens": 3, "finish": "stop", "positions": 2, "metrics": {"kl": 0.5}}
ANSWER |= {"prompt": "Why?", "reference": "So.", "student": "No."}
PREFIX = "evaluation/"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run."""
    folder = tmp_path / "runs" / "kd" / "seed-0"
    (folder / "evaluation").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    lines = [json.dumps(ANSWER | {"prompt_id": name}) + "\n" for name in "ab"]
    (folder / "evaluation" / "answers.jsonl").write_text("".join(lines))
    return Run("kd", 0, folder, {"model": {"student": {"source": "small"}}})


def plan(run: Run, *more: Run) -> Plan:
    out = run.folder.parents[2]
    return Plan("A comparison", out, (run, *more), (0,), {"tokens": 10}, run.method)


def left(run: Run) -> set[str]:
    return {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(40))


ALL = {*FILES, "evaluation/answers.jsonl"}
EVALUATED = {"evaluation/evaluation.json", "evaluation/answers.jsonl"}


@pytest.mark.parametrize("damage", [cut, empty, zeros])
@pytest.mark.parametrize(
    ("name", "with_checkpoint", "removed"),
    [
        ("usage.json", True, {"usage.json", "fitted.json", "evaluation/evaluation.json"}),
        ("fitted.json", True, {"fitted.json", "evaluation/evaluation.json"}),
        ("evaluation/evaluation.json", True, {"evaluation/evaluation.json"}),
        ("evaluation/answers.jsonl", True, {"evaluation/evaluation.json"}),
        ("evaluation/answers.jsonl", False, {"evaluation/evaluation.json", "fitted.json"}),
    ],
)
def test_a_damaged_file_is_named_and_what_it_belongs_to_is_done_again(
    damage, name: str, with_checkpoint: bool, removed: set[str], run: Run
) -> None:
    if with_checkpoint:
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / "last.ckpt").touch()
    before = left(run)
    assert outcome.is_done(run.folder)
    damage(run.folder / name)
    assert not outcome.is_done(run.folder)
    found = outcome.read(run.folder, "kd", 0)
    assert found.status == "damaged"
    assert found.error.startswith(f"{run.folder / name} is damaged (")
    assert found.error.endswith("run the comparison again, which repeats what the file belongs to.")
    results = report.Reporter(plan(run), "").write()
    assert results["methods"][0]["errors"] == {0: found.error}
    for page in ("report.md", "report.html"):
        assert name in (run.folder.parents[2] / page).read_text()
    assert discard_damaged(run) == [found.error]
    assert before - left(run) == removed
    assert outcome.read(run.folder, "kd", 0).status == "unfinished"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("usage.json", {"spent_tokens": "10"}, "(its spent_tokens is no number)"),
        ("usage.json", {"written_tokens": {"teacher": None}}, "(its written_tokens is no number)"),
        ("usage.json", {"\ud83d": 1}, "surrogates not allowed"),
        ("fitted.json", {"wall_seconds": [2.0]}, "(its wall_seconds is no number)"),
        ("evaluation/evaluation.json", {"metrics": False}, "its metrics are no mapping of names to numbers"),
        ("evaluation/evaluation.json", {"metrics": {"kl": "0.5"}}, "its metrics are no mapping of names to numbers"),
        ("evaluation/answers.jsonl", {"prompt_id": []}, "answers.jsonl, line 1: its prompt_id is no text"),
        ("evaluation/answers.jsonl", {"tokens": {}}, "answers.jsonl, line 1: its tokens is no count"),
        ("evaluation/answers.jsonl", {"metrics": "x"}, "answers.jsonl, line 1: its metrics are no mapping"),
    ],
)
def test_a_value_of_another_kind_is_damage(name: str, values: dict[str, object], message: str, run: Run) -> None:
    path = run.folder / name
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | values), *rest, ""]))
    found = outcome.read(run.folder, "kd", 0)
    assert found.status == "damaged"
    assert message in found.error
    report.Reporter(plan(run), "").write()


def test_a_failure_that_cant_be_read_is_none(run: Run) -> None:
    (run.folder / "evaluation" / "evaluation.json").unlink()
    (run.folder / "failed.json").write_text('{"error": "x"}')
    assert outcome.read(run.folder, "kd", 0).error == "x"
    empty(run.folder / "failed.json")
    assert "failed.json is damaged (it is empty)" in outcome.read(run.folder, "kd", 0).error
    discard_damaged(run)
    assert left(run) == {"fitted.json", "usage.json", "evaluation/answers.jsonl"}


def test_answers_that_lack_a_line_are_damaged(run: Run) -> None:
    path = run.folder / "evaluation" / "answers.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert "(it has 1 lines for 2 prompts)" in outcome.read(run.folder, "kd", 0).error


def test_a_log_whose_last_line_is_cut_is_read_up_to_it_and_a_damaged_one_is_named(run: Run) -> None:
    log = run.folder / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("epoch,step,train/loss\n0,1,0.5\n0,2,0.25\n0,3,0.1")
    found = outcome.read(run.folder, "kd", 0)
    assert found.series == {"train/loss": [(1, 0.5), (2, 0.25)]}
    log.write_text("epoch,step,train/loss\n0,1,half\n0,2,0.25\n")
    found = outcome.read(run.folder, "kd", 0)
    assert (found.status, found.series) == ("done", {})
    assert f"The logs in {run.folder} are damaged" in found.error


def test_a_damaged_configuration_is_an_error_of_one_line(run: Run) -> None:
    write_configs(plan(run))
    write_configs(plan(run))
    for damage in (empty, zeros):
        damage(run.file)
        with pytest.raises(StoreError, match=r"run\.yaml is damaged: remove .*seed-0, or choose another folder"):
            write_configs(plan(run))


def test_each_finished_run_is_read_once_and_reports_take_a_small_share_of_the_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, now = [], [0.0]
    read = outcome.read

    def counted(folder: Path, method: str, seed: int) -> outcome.Outcome:
        reads.append(folder)
        now[0] += 1.0
        return read(folder, method, seed)

    monkeypatch.setattr(outcome, "read", counted)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    open_run = Run("sft", 0, run.folder.parents[1] / "sft" / "seed-0", run.config)
    reporter = report.Reporter(plan(run, open_run), "")
    for _ in range(100):  # a run ends each second
        reporter.update()
        now[0] += 1.0
    assert reads.count(run.folder) == 1
    assert 1 < reads.count(open_run.folder) < 8
    assert reporter.write()["methods"][0]["runs"] == {0: "done"}

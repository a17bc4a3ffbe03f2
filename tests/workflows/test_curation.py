"""Curation alone: it writes what training would have written first, and training then writes nothing."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.storage.responses import ResponseStore
from helpers.runs import QUIET, command, save_models, write_config, write_prompts
from helpers.stores import stored

PROMPTS, HELD_OUT = 6, 2


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes the configuration of a run of three steps; gives its path."""
    teacher, student = save_models(tmp_path)
    train = write_prompts(tmp_path / "train.jsonl", PROMPTS, response=True)
    val = write_prompts(tmp_path / "val.jsonl", HELD_OUT)
    sampling = {"max_new_tokens": 4}

    def config(run: str = "run", rounds: Any = "epoch", cached: bool = False, **model: Any) -> str:
        live = part("TransformersTeacher", source=teacher, dtype="float32")
        kept = part("CachedTeacher", teacher=live, folder=str(tmp_path / "scores"))
        curator = part(
            "PairedCurator",
            chosen=part("TeacherCurator", sampling=sampling),
            rejected=part("StudentCurator", sampling=sampling, rounds=rounds),
        )
        settings = {
            "trainer": QUIET
            | {
                "default_root_dir": str(tmp_path / run),
                "max_epochs": 1,
                "callbacks": [part("RunCheckpoint"), part("Export"), part("Throughput")],
            },
            "model": {
                "student": {"source": student, "lora": {"r": 2}},
                "teacher": kept if cached else live,
                "loss": part("DistiLLM2"),
                "curator": curator,
                "generator": part("TransformersGenerator", progress=False),
                "answers": {"temperature": 0.0, "max_new_tokens": 4},
            }
            | model,
            "data": {"train": train, "val": val, "batch_size": 2},
        }
        return write_config(tmp_path / f"{run}.yaml", settings)

    return config


def written(run: Path) -> dict[str, int]:
    """How many responses a run's store holds, by who wrote them."""
    found: dict[str, int] = {}
    for shard in ResponseStore(run / "responses").shards():
        found[shard["writer"]] = found.get(shard["writer"], 0) + shard["responses"]
    return found


def content(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file() and "lock" not in name}


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The report that `curate` ends with."""
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds a closed stream
    capsys.readouterr()
    assert main(["curate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_it_writes_what_training_writes_first(write: Callable[..., str], tmp_path: Path) -> None:
    assert command(["curate", "--config", write("ahead")]) == 0
    assert [path.name for path in (tmp_path / "ahead").iterdir()] == ["responses"], "no run: nothing was trained"
    assert written(tmp_path / "ahead") == {"teacher": PROMPTS + HELD_OUT, "student": PROMPTS}
    ahead = content(tmp_path / "ahead" / "responses")

    assert command(["fit", "--config", write("ahead")]) == 0
    assert content(tmp_path / "ahead" / "responses") == ahead, "nothing is left to write"
    assert command(["fit", "--config", write("alone")]) == 0
    assert content(tmp_path / "alone" / "responses") == ahead


def test_of_a_short_round_only_its_prompts_are_answered_and_the_rest_once(
    write: Callable[..., str], tmp_path: Path
) -> None:
    assert command(["curate", "--config", write(rounds={"every": 2})]) == 0
    assert written(tmp_path / "run") == {"teacher": PROMPTS + HELD_OUT, "student": 4}


def test_it_says_what_there_is_and_what_there_was(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "responses"
    for before, of_student, of_teacher in (("first", 0, 0), ("again", 6, 8)):
        assert said(capsys, monkeypatch, "--config", write())[-2:] == [
            f"{folder}: 6 responses by the student, {of_student} of them were there already",
            f"{folder}: 8 responses by the teacher, {of_teacher} of them were there already",
        ], before


def test_responses_of_the_data_are_not_written(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"teacher": None, "curator": part("DatasetCurator"), "loss": part("CrossEntropy")}
    found = said(capsys, monkeypatch, "--config", write(**model), "--data.val=null")
    assert found[-1] == f"{tmp_path / 'run' / 'responses'}: no responses were generated, they all come with the data"
    assert not (tmp_path / "run").exists()


def test_one_that_was_killed_goes_on(write: Callable[..., str], tmp_path: Path) -> None:
    assert command(["curate", "--config", write("alone")]) == 0
    # Calls: 1 teacher for validation, 2 teacher, 3 student.
    killed = write("killed", generator=part("helpers.killed.KilledGenerator", call=3, progress=False))
    assert command(["curate", "--config", killed]) == -signal.SIGKILL
    assert written(tmp_path / "killed") == {"teacher": PROMPTS + HELD_OUT}
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "responses").rglob("*.arrow")}
    assert command(["curate", "--config", write("killed")]) == 0
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in shards}.items()
    # Not byte by byte: a shard names the class of its generator.
    assert stored(tmp_path / "killed" / "responses") == stored(tmp_path / "alone" / "responses")


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 2 * PROMPTS + HELD_OUT),
        ({"curator": part("DatasetCurator"), "loss": part("SkewKL")}, PROMPTS + HELD_OUT),
        ({"curator": part("DatasetCurator"), "loss": part("CrossEntropy")}, HELD_OUT),
    ],
)
def test_training_needs_no_teacher_after_its_scores_are_kept(
    settings: dict[str, Any],
    rows: int,
    write: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write(cached=True, **settings)
    found = said(capsys, monkeypatch, "--config", config, "--score")
    assert found[-1] == f"the teacher's scores of {rows} rows are cached"
    before = [content(tmp_path / name) for name in ("run/responses", "scores")]
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert command(["fit", "--config", config]) == 0
    assert [content(tmp_path / name) for name in ("run/responses", "scores")] == before
    # Without what was written and scored it would have been needed.
    assert command(["fit", "--config", config, f"--trainer.default_root_dir={tmp_path / 'other'}"]) != 0


def test_without_being_told_the_teacher_scores_nothing(write: Callable[..., str], tmp_path: Path) -> None:
    assert command(["curate", "--config", write(cached=True)]) == 0
    assert not list((tmp_path / "scores").rglob("manifest-*.json"))


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({}, "a TransformersTeacher"),
        ({"teacher": None, "curator": part("StudentCurator"), "loss": part("CrossEntropy")}, "none"),
    ],
)
def test_scores_that_nobody_would_keep_are_refused_before_a_model_is_loaded(
    settings: dict[str, Any],
    who: str,
    write: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("distillkit.models.loading.read_model", "distillkit.teachers.transformers.load_model"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("a model was loaded before the error"))
    monkeypatch.setattr("logging.raiseExceptions", False)
    assert main(["curate", "--config", write(**settings), "--score"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"distillkit curate: error: --score needs a teacher that caches its scores, and model.teacher is {who}: wrap "
        "it in a CachedTeacher, or leave --score out."
    )


def test_the_saved_configuration_of_a_run_is_taken_but_no_checkpoint(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(["fit", "--config", write()]) == 0
    saved = str(tmp_path / "run" / "config.yaml")
    before = content(tmp_path / "run")
    assert said(capsys, monkeypatch, "--config", saved)[-2].endswith("6 of them were there already")
    assert content(tmp_path / "run") == before
    assert main(["curate", "--config", saved, "--ckpt_path", "last"]) == 1
    assert "unknown key ckpt_path" in capsys.readouterr().err

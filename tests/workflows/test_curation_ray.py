"""Curation by the workers of a Ray cluster on this machine: the responses of one process, whatever happens."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.errors import ConfigError, StoreError
from distillkit.workflows.curation_ray import ShardReport, Workers, require_all
from helpers.runs import QUIET, command, save_models, write_config, write_prompts
from helpers.stores import counts, shard_files, stored

PROMPTS, HELD_OUT = 300, 2
"""Three groups of each writer, two of them by the first of two workers."""

WRITTEN = 2 * PROMPTS + HELD_OUT


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS)
    write_prompts(root / "val.jsonl", HELD_OUT)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers, which can import what tests can."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield
        ray.shutdown()


def config(folder: Path, run: str, **model: Any) -> str:
    sampling = {"max_new_tokens": 3}
    pair = {
        name: part(curator, sampling=sampling)
        for name, curator in (("chosen", "TeacherCurator"), ("rejected", "StudentCurator"))
    }
    settings = {
        "trainer": QUIET | {"default_root_dir": str(folder / run), "max_steps": 1},
        "model": {
            "student": {"source": "student"},
            "teacher": part("TransformersTeacher", source="teacher", dtype="float32"),
            "loss": part("DistiLLM2"),
            "curator": part("PairedCurator", **pair),
            "generator": part("TransformersGenerator", progress=False),
            "answers": {"temperature": 0.0, "max_new_tokens": 3},
        }
        | model,
        "data": {"train": "train.jsonl", "val": "val.jsonl", "batch_size": 2},
    }
    return write_config(folder / f"{run}.yaml", settings)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The store that one process wrote."""
    here = Path.cwd()
    os.chdir(folder)
    assert command(["curate", "--config", config(folder, "alone")]) == 0
    os.chdir(here)
    return folder / "alone" / "responses"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
class TestCluster:
    """One cluster for all of them."""

    @pytest.fixture(autouse=True)
    def here(self, folder: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """The configurations name files by paths from here."""
        monkeypatch.chdir(folder)
        monkeypatch.setattr("logging.raiseExceptions", False)

    def test_two_workers_write_what_one_process_writes(
        self, folder: Path, alone: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = folder / "bucket"
        run = config(folder, "two", store=f"file://{store}")
        assert main(["curate", "--config", run, "--workers=2"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert sorted(line.split(" on ")[0] for line in said[:2]) == ["shard 1/2", "shard 2/2"]
        assert sum(int(line.split(": ")[1].split()[0]) for line in said[:2]) == WRITTEN
        assert said[2].endswith("300 responses by the student, 0 of them were there already")
        assert stored(store) == stored(alone)
        assert set(counts(store).values()) == {1}
        names = {path.name for path in store.glob("manifest-*.json")}
        assert names == {"manifest-1of2.00000-00000.json", "manifest-2of2.00000-00000.json"}

        files = {path: path.read_bytes() for path in shard_files(store)}
        assert main(["curate", "--config", run, "--workers=2"]) == 0
        assert "shard 2/2" in (again := capsys.readouterr().out)
        assert again.count(": 0 responses, 0 tokens in ") == 2
        assert command(["fit", "--config", run]) == 0
        assert {path: path.read_bytes() for path in shard_files(store)} == files, "nothing is written again"

    def test_a_worker_that_is_killed_goes_on_and_nothing_is_lost_or_written_twice(
        self, folder: Path, alone: Path
    ) -> None:
        marker = folder / "killed once"
        killed = part("helpers.killed.KilledOnce", marker=str(marker), progress=False)
        run = config(folder, "killed", generator=killed)
        assert main(["curate", "--config", run, "--workers=2"]) == 0
        assert marker.exists(), "or nobody was killed"
        assert stored(folder / "killed" / "responses") == stored(alone)
        assert set(counts(folder / "killed" / "responses").values()) == {1}

    def test_workers_that_give_up_are_told_of_and_another_run_goes_on(
        self, folder: Path, alone: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gives_up = part("StudentCurator", sampling={"max_new_tokens": 3}, generator=part("helpers.killed.GivesUp"))
        pair = part("PairedCurator", chosen=part("TeacherCurator", sampling={"max_new_tokens": 3}), rejected=gives_up)
        run = config(folder, "gives-up", curator=pair)
        assert main(["curate", "--config", run, "--workers=2"]) == 1
        told = capsys.readouterr()
        assert told.out.count("failed: The ink ran out.") == 2
        assert "2 of 2 workers failed, the first with: The ink ran out. The responses so far are stored" in told.err
        assert sum(stored(folder / "gives-up" / "responses").values()) == PROMPTS + HELD_OUT, "the teacher's"
        assert main(["curate", "--config", config(folder, "gives-up"), "--workers=2"]) == 0
        assert stored(folder / "gives-up" / "responses") == stored(alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=0"], "--workers must be at least 1, got 0"),
        (["--workers=2", "--gpus_per_worker=-1"], "--gpus_per_worker must not be below 0, got -1"),
        (["--workers=2", "--shard=1/2"], "--workers gives each worker a shard: leave --shard out"),
        (
            ["--workers=2", "--score"],
            "--score needs all responses, but with --workers each process generates only a part",
        ),
    ],
)
def test_what_workers_cannot_do_is_refused_before_ray_is_started(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.setattr("distillkit.workflows.curation_ray.run", lambda *_: pytest.fail("ray was started"))
    assert main(["curate", "--config", config(folder, "refused"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ConfigError, match=r'--workers needs ray .*: pip install "distillkit\[ray\]"'):
        Workers(2)


def test_responses_on_disks_of_the_workers_own_are_missed() -> None:
    reports = [ShardReport("1/2", "north", 10), ShardReport("2/2", "south", 5)]
    require_all("responses", 3, 18, reports)
    with pytest.raises(StoreError, match="responses lacks 5 of 15 responses that workers on north, south generated"):
        require_all("responses", 3, 13, reports)

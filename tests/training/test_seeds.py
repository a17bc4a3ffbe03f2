"""One seed, `seed_everything`, is that of everything random in a run, unless a part has its own."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from safetensors.torch import load_file

from distillkit import DistillData, Sampling
from distillkit.cli.main import main
from distillkit.curators.mixed import MixedCurator
from distillkit.curators.replay import ReplayCurator
from distillkit.curators.single import DatasetCurator, StudentCurator
from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError
from distillkit.storage.responses import ResponseStore
from helpers.runs import QUIET, save_models, write_config, write_prompts


def seeds() -> list[int | None]:
    """The seed of each part that is made without one."""
    return [
        Sampling().seed,
        DistillData("train.jsonl").seed,
        MixedCurator([DatasetCurator(), DatasetCurator()], [0.5, 0.5]).seed,
        ReplayCurator(StudentCurator()).seed,
        StudentCurator().sampling.seed,
    ]


def test_parts_without_a_seed_have_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(seeds()) == {0}
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert set(seeds()) == {7}


def test_a_seed_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert Sampling(seed=0).seed == DistillData("train.jsonl", seed=0).seed == 0


def test_greedy_responses_have_one_seed_so_that_runs_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert Sampling(temperature=0.0) == Sampling(temperature=0.0, seed=0)


def test_a_seed_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "seven")
    with pytest.raises(ConfigError, match="PL_GLOBAL_SEED must be a whole number, got 'seven'"):
        resolve_seed(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeds")
    save_models(root)
    write_prompts(root / "train.jsonl", 4)
    return root


def student(folder: Path, name: str, seed: int, **model: Any) -> dict[str, torch.Tensor]:
    """A run of the command; the exported student."""
    root = folder / name
    config = {
        "seed_everything": seed,
        "trainer": QUIET
        | {"default_root_dir": str(root), "max_epochs": 1, "logger": False}
        | {"callbacks": [{"class_path": "RunCheckpoint"}, {"class_path": "Export"}]},
        "model": {
            "student": {"source": str(folder / "student")},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": str(folder / "teacher")}},
            "loss": {"class_path": "ForwardKL"},
            "curator": {
                "class_path": "StudentCurator",
                "init_args": {"sampling": {"max_new_tokens": 4}, "rounds": "step"},
            },
            "generator": {"class_path": "TransformersGenerator", "init_args": {"progress": False}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
        "data": {"train": str(folder / "train.jsonl"), "batch_size": 2},
    }
    assert main(["fit", "--config", write_config(folder / f"{name}.yaml", config)]) == 0
    return load_file(root / "export" / "model.safetensors")


def test_two_seeds_give_two_students_and_one_gives_one(folder: Path) -> None:
    first, again, other = (student(folder, name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert any(not torch.equal(first[name], value) for name, value in other.items())
    sampled = [shard["sampling"]["seed"] for shard in ResponseStore(folder / "c" / "responses").shards()]
    assert set(sampled) == {2}
    saved = yaml.safe_load((folder / "c" / "config.yaml").read_text())
    assert (saved["seed_everything"], saved["data"]["seed"]) == (2, None)


def test_in_python_too(folder: Path) -> None:
    lightning.seed_everything(5, verbose=False)
    assert set(seeds()) == {5}

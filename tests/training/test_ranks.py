"""Two ranks = one rank, with gloo on the CPU."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from distillkit.storage.responses import ResponseStore
from helpers import rank_runs
from helpers.runs import ROUNDING, assert_same_steps, finish, on_two_ranks, process, save_models, write_prompts

CASES = [f"{loss}-{reduction}" for loss in ("SkewKL", "DistiLLM2") for reduction in ("sequence_mean", "token_mean")]
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: the runs in one process and on two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    models = save_models(root)
    write_prompts(root / "prompts.jsonl", rank_runs.PROMPTS)
    write_prompts(root / "held_out.jsonl", rank_runs.HELD_OUT)
    for name in ("one", "two"):
        (root / name).mkdir()
    with process(rank_runs.both, models, str(root / "one"), 1) as single:
        on_two_ranks(rank_runs.both, models, str(root / "two"), 2)
        assert finish(single) == 0
    return root


def seen(folder: Path, case: str) -> tuple[Seen, Seen, Seen]:
    """What the single process saw, and each of the two ranks."""
    names = (f"one/{case}-0.pt", f"two/{case}-0.pt", f"two/{case}-1.pt")
    one, first, second = (torch.load(folder / name) for name in names)
    return one, first, second


@pytest.mark.parametrize("case", [*CASES, "generated", "ahead"])
def test_two_ranks_have_the_gradients_of_one_process(case: str, folder: Path) -> None:
    one, *ranks = seen(folder, case)
    assert len(one["gradients"]) == 3
    for rank in ranks:
        assert_same_steps(rank["gradients"], one["gradients"])


@pytest.mark.parametrize("case", [*CASES, "generated", "ahead"])
def test_two_ranks_log_the_figures_of_one_process(case: str, folder: Path) -> None:
    one, *ranks = seen(folder, case)
    assert any("train/loss" in figures for _, figures in one["rows"])
    for rank in ranks:
        assert [step for step, _ in rank["rows"]] == [step for step, _ in one["rows"]]
        for (_, ours), (_, theirs) in zip(rank["rows"], one["rows"], strict=True):
            assert ours == pytest.approx(theirs, rel=ROUNDING)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("DistiLLM2")])
def test_the_reference_gap_is_the_same_everywhere(case: str, folder: Path) -> None:
    one, first, second = (found["loss"] for found in seen(folder, case))
    assert float(one["alpha_teacher.gap_count"]) == 8, "a row each of the 8 prompts of the first two steps"
    assert float(one["alpha_teacher.gap_sum"]) != 0
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=ROUNDING, atol=1e-8)


def test_held_out_figures_are_those_of_one_process_on_both_ranks(folder: Path) -> None:
    one, first, second = (found["history"] for found in seen(folder, "generated"))
    assert [row["step"] for row in one] == [0, 3]
    assert first == second
    for ours, theirs in zip(first, one, strict=True):
        assert ours == pytest.approx(theirs, rel=ROUNDING)


def test_each_response_is_written_once(folder: Path) -> None:
    one, two = (stored(folder / name / "generated" / "responses") for name in ("one", "two"))
    # Teacher: once, and for validation; student: rounds of 8 and 1 prompts.
    assert len(one) == rank_runs.PROMPTS + rank_runs.HELD_OUT + rank_runs.PROMPTS
    assert len(set(two)) == len(two)
    assert sorted((writer, number, prompt) for writer, number, _, prompt in two) == sorted(
        (writer, number, prompt) for writer, number, _, prompt in one
    )


def stored(folder: Path) -> list[tuple[str, int, str, str]]:
    """Every response by writer, round, provenance key and prompt id."""
    found = []
    for shard in ResponseStore(folder).shards():
        with pa.memory_map(str(folder / shard["file"])) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        found += [(shard["writer"], shard["round"], shard["key"], row["prompt_id"]) for row in rows]
    return found


def test_one_checkpoint_is_written(folder: Path) -> None:
    files = [path for path in (folder / "two" / "generated" / "checkpoints").iterdir() if not path.is_symlink()]
    assert [path.name for path in files] == ["step=0000003.ckpt"]
    saved = torch.load(files[0])["distillkit"]
    assert len(saved["random"]) == 2, "one state of the random numbers for each rank"


@pytest.mark.slow
def test_the_real_command_starts_its_second_rank_itself(tmp_path: Path) -> None:
    teacher, student = save_models(tmp_path)
    settings = {
        "trainer.strategy": "ddp",
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path / "run",
        "model.loss": "DistiLLM2",
        "model.curator": "PairedCurator",
        "model.student.source": student,
        "model.teacher": "TransformersTeacher",
        "model.teacher.source": teacher,
        "data.train": write_prompts(tmp_path / "train.jsonl", 5),
        "data.val": write_prompts(tmp_path / "val.jsonl", 1),
        "data.batch_size": 2,
        "trainer.log_every_n_steps": 1,
        "model.answers.max_new_tokens": 4,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run([sys.executable, "-m", "distillkit.cli.main", "fit", *arguments], check=True, timeout=300)
    assert len(list((tmp_path / "run" / "csv").iterdir())) == 1
    assert set(Counter(stored(tmp_path / "run" / "responses")).values()) == {1}

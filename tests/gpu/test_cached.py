"""Runs on kept scores of a teacher are runs on a live one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit import DistillModule
from distillkit.data.collate import collate
from distillkit.losses import DistiLLM2, ForwardKL, SkewKL
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Batch
from gpu.small import ON_CPU, assert_near, data_of, fit, module_of, weights_of
from helpers.models import tiny_tokenizer
from helpers.runs import MemoryLogger
from helpers.scores import some_rows

pytestmark = pytest.mark.gpu

WIDTH = len(tiny_tokenizer())


def run(
    folder: Path, models: tuple[str, str], teacher: Any, loss: Any = None, layout: str = "padded"
) -> tuple[DistillModule, MemoryLogger]:
    """Two epochs of three steps on the data's responses, with a validation after each."""
    store = str(folder.parent / "responses")  # the teacher's answers to held-out prompts are written once
    module = module_of(models, teacher=teacher, loss=loss or SkewKL(), store=store)
    data = data_of(folder / "data", prompts=6, held_out=2, layout=layout)
    return module, fit(folder, module, data, max_epochs=2)


def live(models: tuple[str, str], dtype: Any = "float32") -> TransformersTeacher:
    return TransformersTeacher(models[0], dtype)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_run_on_kept_hidden_states_is_the_run_with_a_live_teacher(
    layout: str, models: tuple[str, str], tmp_path: Path
) -> None:
    expected, live_log = run(tmp_path / "live", models, live(models), layout=layout)
    teacher = CachedTeacher(live(models), folder=str(tmp_path / "kept"))
    module, log = run(tmp_path / "cached", models, teacher, layout=layout)
    assert len(log.column("train/loss")) == 6
    # Kept rows were scored in other batches, in another layout: alike up to the rounding of float32.
    assert log.column("train/loss") == pytest.approx(live_log.column("train/loss"), rel=1e-4)
    assert log.column("val/kl") == pytest.approx(live_log.column("val/kl"), rel=1e-4)
    assert teacher.teacher.model is None, "it left the memory"
    assert_near(list(weights_of(module).values()), list(weights_of(expected).values()), 1e-4)

    again, same_log = run(tmp_path / "again", models, teacher_from(tmp_path / "kept", models), layout=layout)
    # Bit for bit where every kernel sums in one order; attention's backward need not.
    assert same_log.column("train/loss")[0] == log.column("train/loss")[0]
    assert same_log.column("train/loss") == pytest.approx(log.column("train/loss"), rel=1e-5)
    assert again.teacher.teacher.model is None


def teacher_from(folder: Path, models: tuple[str, str]) -> CachedTeacher:
    """A cached teacher whose model must not be needed."""

    class Absent(TransformersTeacher):
        def setup(self, device: torch.device) -> None:
            raise AssertionError("the model was loaded")

        def identity(self) -> str | None:
            return live(models).identity()

    return CachedTeacher(Absent(models[0], "float32"), folder=str(folder))


@pytest.mark.parametrize("loss", [ForwardKL, DistiLLM2])
def test_a_run_on_all_but_one_of_the_tokens_is_the_run_with_a_live_teacher(
    loss: Any, models: tuple[str, str], tmp_path: Path
) -> None:
    # All others together are then one token: what is left is the rounding of log-probabilities to half precision.
    _, live_log = run(tmp_path / "live", models, live(models), loss())
    teacher = CachedTeacher(live(models), keep="top_k", k=WIDTH - 1, folder=str(tmp_path / "kept"))
    _, log = run(tmp_path / "cached", models, teacher, loss())
    assert log.column("train/loss") == pytest.approx(live_log.column("train/loss"), rel=2e-3)


def test_few_tokens_are_an_approximation_that_trains(models: tuple[str, str], tmp_path: Path) -> None:
    teacher = CachedTeacher(live(models), keep="top_k", k=16, folder=str(tmp_path / "kept"))
    _, log = run(tmp_path / "cached", models, teacher, ForwardKL())
    first, *_, last = log.column("train/loss")
    assert 0 < last < first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_hidden_states_are_read_back_bit_for_bit_on_the_device(
    dtype: Any, models: tuple[str, str], device: torch.device, tmp_path: Path
) -> None:
    teacher = CachedTeacher(live(models, dtype), folder=str(tmp_path), unload=False)
    teacher.setup(device)
    teacher.limit_vocab(WIDTH)
    rows = some_rows(9, vocab=WIDTH)
    teacher.prepare(rows)
    batches = [collate(rows[start : start + 3], pad_id=0, layout="padded").to(device) for start in (0, 3, 6)]
    for batch in batches:
        scores, expected = teacher.score(batch), scores_in_one_batch(teacher.teacher, rows, batch, device)
        assert scores.hidden.device == device
        assert scores.hidden.dtype == expected.dtype
        assert torch.equal(scores.hidden, expected)
    scores = [teacher.score(batch) for batch in batches]  # copies may still be on their way when the next are read
    if not ON_CPU:
        torch.cuda.synchronize()
    for batch, read in zip(batches, scores, strict=True):
        assert torch.equal(read.hidden, scores_in_one_batch(teacher.teacher, rows, batch, device))


def scores_in_one_batch(teacher: Any, rows: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Hidden states of a batch's positions, scored in the one batch that `prepare` forms of these rows."""
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), row.key))
    whole = collate(ordered, pad_id=0).to(device)
    parts = dict(zip(whole.keys, teacher.score(whole).hidden.split(whole.lengths), strict=True))
    return torch.cat([parts[key] for key in batch.keys])

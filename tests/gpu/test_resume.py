"""A run that was stopped and resumed is the run that was left alone, bit for bit, with dropout on."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillModule, Sampling, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.losses import DistiLLM2
from distillkit.models.student import Lora
from distillkit.schedules import AdaptiveAlpha
from distillkit.training.resume import random_state, restore_random
from gpu.small import ON_CPU, data_of, fit, module_of
from helpers.runs import MemoryLogger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("deterministic"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

STEPS, STOP = 8, 3
"""Two epochs of four steps; the run is stopped within the first."""


class Stop(lightning.Callback):
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def run(
    folder: Path,
    models: tuple[str, str],
    seed: int,
    stop: int | None = None,
    resume: bool = False,
    lora: bool = True,
    overlap: bool = False,
) -> tuple[DistillModule, MemoryLogger]:
    """Trains on pairs of which the student's half is written every two steps."""
    torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens=5)
    module = module_of(
        models,
        student=Student(models[1], lora=Lora(r=4, dropout=0.5) if lora else None),
        loss=DistiLLM2(alpha=AdaptiveAlpha(warmup_steps=2)),
        curator=PairedCurator(TeacherCurator(sampling), StudentCurator(sampling, {"every": 2})),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2),
        lr_schedule="cosine",
        overlap=overlap,
    )
    callbacks: list[lightning.Callback] = [RunCheckpoint(every_n_steps=STOP)]
    callbacks += [] if stop is None else [Stop(stop)]
    log = fit(
        folder,
        module,
        data_of(folder.parent / "data", held_out=2),
        callbacks,
        "last" if resume else None,
        max_epochs=2,
        enable_checkpointing=True,
    )
    return module, log


def assert_equal(ours: Any, theirs: Any, name: str = "") -> None:
    """Compares nested state, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours.cpu(), theirs.cpu()), name
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), name
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{name}.{number}")
    else:
        assert ours == theirs, name


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
def test_a_resumed_run_ends_as_the_one_that_was_left_alone(
    overlap: bool, models: tuple[str, str], tmp_path: Path
) -> None:
    _, log = run(tmp_path / "alone", models, seed=1, overlap=overlap)
    _, first = run(tmp_path / "stopped", models, seed=1, stop=STOP, overlap=overlap)
    _, second = run(tmp_path / "stopped", models, seed=2, resume=True, overlap=overlap)
    losses = log.column("train/loss")
    assert len(losses) == STEPS
    assert first.column("train/loss") == losses[:STOP]
    assert second.column("train/loss") == losses[STOP:]
    for name in ("train/alpha_student", "train/gap_teacher"):
        assert first.column(name) + second.column(name) == log.column(name)
    assert second.column("val/kl")[-1] == log.column("val/kl")[-1]
    ours, theirs = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("stopped", "alone"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "distillkit"):
        assert_equal(ours[part], theirs[part], part)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    state = theirs["distillkit"]["random"][0]
    assert state.keys() == ({"cpu"} if ON_CPU else {"cpu", "cuda"})


def test_other_random_numbers_would_be_seen(models: tuple[str, str], tmp_path: Path) -> None:
    _, log = run(tmp_path / "one", models, seed=1, stop=2)
    _, other = run(tmp_path / "other", models, seed=2, stop=2)
    # The second adapter matrix is 0 at first.
    assert log.column("train/loss")[1] != other.column("train/loss")[1], "dropout draws from the seed"


def test_random_states_are_put_back_on_their_devices(device: torch.device) -> None:
    torch.manual_seed(5)
    state = random_state(device)
    expected = torch.rand(4), torch.rand(4, device=device)
    # Lightning loads a checkpoint's tensors onto the device; the generators take them from the host.
    restore_random([{name: tensor.to(device) for name, tensor in state.items()}], 0, device)
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.rand(4, device=device), expected[1])

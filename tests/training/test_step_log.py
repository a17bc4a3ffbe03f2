"""Learning rate and gradient norm of each step, as every logger gets them."""

import functools
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks.plots import curves
from distillkit.losses import CrossEntropy, ForwardKL
from distillkit.teachers import TransformersTeacher
from distillkit.training.step_log import learning_rates
from distillkit.types import Slicing
from helpers.runs import QUIET, Gradients, MemoryLogger, save_models, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steplog")
    save_models(root)
    write_prompts(root / "train.jsonl", 8, response=True)
    return root


def fit(folder: Path, root: Path, fused: bool = False, **settings: Any) -> tuple[MemoryLogger, Gradients]:
    module = DistillModule(
        Student(str(folder / "student")),
        CrossEntropy(),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, fused=fused),
        lr_schedule="linear",
        warmup=0.25,
    )
    logger, gradients = MemoryLogger(), Gradients()
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "enable_checkpointing": False}
    trainer = lightning.Trainer(**options | settings, logger=logger, callbacks=[gradients])
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2))
    return logger, gradients


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_measured_before_it_is_clipped(accumulate: int, folder: Path, tmp_path: Path) -> None:
    logger, gradients = fit(folder, tmp_path, gradient_clip_val=1e-3, accumulate_grad_batches=accumulate)
    norms = [torch.cat([g.flatten() for g in step.values()]).norm().item() for step in gradients.steps]
    assert len(norms) == 4 // accumulate
    assert logger.column("train/grad_norm") == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1e-3


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_takes_a_clipped_gradient(algorithm: str, folder: Path, tmp_path: Path) -> None:
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    losses = [fit(folder, tmp_path / str(fused), fused, **settings)[0].column("train/loss") for fused in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    unclipped, _ = fit(folder, tmp_path, True, precision="bf16-mixed")
    assert losses[1] != pytest.approx(unclipped.column("train/loss"), rel=1e-4)


def test_the_learning_rate_is_that_of_the_step(folder: Path, tmp_path: Path) -> None:
    logger, _ = fit(folder, tmp_path)
    assert logger.column("train/lr") == pytest.approx([0.0, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3])


def test_groups_with_rates_of_their_own_are_named() -> None:
    weight, bias = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "name": "body"}, {"params": [bias], "lr": 0.5}]
    rates = learning_rates(torch.optim.SGD(groups, lr=0.1))
    assert {name: float(rate) for name, rate in rates.items()} == pytest.approx({"lr/body": 0.1, "lr/1": 0.5})


def test_between_two_logged_steps_nothing_is_read_from_the_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: reads.append(1) or original(self, *args))
    fit(folder, tmp_path, log_every_n_steps=4, enable_progress_bar=True)
    steps_read = len(reads)
    reads.clear()
    fit(folder, tmp_path, log_every_n_steps=1, enable_progress_bar=True)
    assert len(reads) - steps_read == 3 * 2, "loss and learning rate of the other three steps"


class Entropy(ForwardKL):
    """A divergence that reports the student's entropy."""

    def metrics(self, logp: torch.Tensor, logq: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"entropy": -(logq.exp() * logq).sum(-1)}


def test_what_a_loss_reports_is_a_mean_over_the_global_batch(folder: Path, tmp_path: Path) -> None:
    entropies = []
    for size, accumulate, positions in ((4, 1, None), (2, 2, None), (1, 4, 3)):
        module = DistillModule(
            Student(str(folder / "student")),
            Entropy(),
            TransformersTeacher(str(folder / "teacher"), dtype="float32"),
            slicing=Slicing(max_positions=positions),
        )
        logger = MemoryLogger()
        options = QUIET | {"max_steps": 1, "default_root_dir": tmp_path, "enable_checkpointing": False}
        trainer = lightning.Trainer(**options, logger=logger, accumulate_grad_batches=accumulate)
        trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=size, shuffle=False))
        entropies += logger.column("train/entropy")
    assert len(entropies) == 3
    assert entropies == pytest.approx(entropies[:1] * 3, rel=1e-5)


def test_the_curves_have_what_a_loss_reports_and_the_gradient_norm() -> None:
    series = {f"train/{name}": [(0, 1.0), (1, -2.0)] for name in ("loss", "entropy", "q", "lr", "grad_norm", "mfu")}
    panels = {axes.get_title(): axes for axes in curves(series, "a run", ["q"]).axes}
    lines = {title: [line.get_label() for line in axes.lines] for title, axes in panels.items()}
    assert lines["Reported by the loss"] == ["entropy"]
    assert lines["Schedules"] == ["q"]
    assert lines["Gradient norm before clipping"] == ["gradient norm"]
    assert panels["Reported by the loss"].get_ylim()[0] < -2, "what is below 0 is shown"

"""DistiLLM-2 with both of its schedules moves them on the device as on the CPU."""

import math
from pathlib import Path
from typing import Any

import pytest

from distillkit.losses import DistiLLM2
from distillkit.schedules import AdaptiveAlpha, Linear
from gpu.small import data_of, fit, module_of
from helpers.runs import MemoryLogger, UnequalPairs

pytestmark = pytest.mark.gpu

STEPS = 8
FIGURES = (
    "loss",
    "beta",
    "alpha_teacher",
    "alpha_student",
    "alpha_teacher_min",
    "alpha_student_max",
    "gap_teacher",
    "gap_student",
    "reference_gap_teacher",
    "reference_gap_student",
    "divergence_teacher",
    "divergence_student",
)


def run(folder: Path, models: tuple[str, str], layout: str, **trainer: Any) -> MemoryLogger:
    """Two epochs of four steps, each of two micro-batches; the rows depend on the prompts alone."""
    loss = DistiLLM2(
        alpha=AdaptiveAlpha(initial=0.1, min=0.01, max=0.5, warmup_steps=2), beta=Linear(start=0.5, end=0.75, until=0.5)
    )
    module = module_of(models, loss=loss, curator=UnequalPairs())
    data = data_of(folder / "data", prompts=16, held_out=2, layout=layout)
    return fit(folder, module, data, max_epochs=2, accumulate_grad_batches=2, **trainer)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_alpha_and_beta_are_those_of_the_cpu(layout: str, models: tuple[str, str], tmp_path: Path) -> None:
    log = run(tmp_path / "device", models, layout)
    expected = run(tmp_path / "cpu", models, layout, accelerator="cpu")
    for name in FIGURES:
        ours, theirs = (figures.column(f"train/{name}") for figures in (log, expected))
        assert len(ours) == len(theirs) == STEPS, name
        assert all(math.isfinite(value) for value in ours), name
        # Rounding of float32 over eight steps; a gap is a difference of likelihoods of up to 1.
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5), name
    assert log.column("train/beta") == pytest.approx([0.5, 0.5625, 0.625, 0.6875, 0.75, 0.75, 0.75, 0.75])
    alphas = log.column("train/alpha_teacher")
    assert alphas[:2] == pytest.approx([0.1, 0.1])
    assert len(set(alphas[2:])) > 2, "they follow the gaps"
    assert log.column("val/kl") == pytest.approx(expected.column("val/kl"), rel=2e-3)

"""Every precision trains, in the types that it promises."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit.losses import DistiLLM2, ForwardKL
from gpu.small import data_of, fit, module_of, needs_cuda

pytestmark = pytest.mark.gpu

# Of `trainer.precision`: the type of weights, gradients and the optimizer's moments.
TYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}
every_precision = pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=needs_cuda if name == "16-mixed" else ()) for name in TYPES]
)


class Types(lightning.Callback):
    """Keeps the types of weights, gradients and moments at each optimizer step."""

    def __init__(self) -> None:
        self.weights: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()
        self.moments: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = list(pl_module.student.parameters())
        self.weights |= {tensor.dtype for tensor in parameters}
        self.gradients |= {tensor.grad.dtype for tensor in parameters if tensor.grad is not None}
        self.moments |= {state["exp_avg"].dtype for state in optimizer.state.values()}


def train(
    folder: Path, models: tuple[str, str], precision: Any, loss: Any, steps: int
) -> tuple[Types, list[float], Any]:
    types = Types()
    module = module_of(models, loss=loss, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
    data = data_of(folder / "data", prompts=4, batch_size=4)
    log = fit(folder, module, data, [types], precision=precision, max_epochs=steps)
    return types, log.column("train/loss"), module


@every_precision
@pytest.mark.parametrize("loss", [ForwardKL, DistiLLM2])
def test_the_loss_falls_and_the_types_are_those_of_the_precision(
    precision: str, loss: Any, models: tuple[str, str], tmp_path: Path
) -> None:
    types, losses, module = train(tmp_path, models, precision, loss(), steps=12)
    assert len(losses) == 12
    assert all(0 < value < 100 for value in losses)
    assert losses[-1] < 0.7 * losses[0]
    assert types.weights == types.gradients == types.moments == {TYPES[precision]}
    assert {tensor.dtype for tensor in module.teacher.model.parameters()} == {torch.float32}, "as it was asked for"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", pytest.param("16-mixed", marks=needs_cuda)])
def test_half_precision_starts_where_float32_starts(precision: str, models: tuple[str, str], tmp_path: Path) -> None:
    _, expected, _ = train(tmp_path / "32", models, "32-true", ForwardKL(), steps=5)
    _, losses, _ = train(tmp_path / "half", models, precision, ForwardKL(), steps=5)
    assert losses[0] == pytest.approx(expected[0], rel=0.05)
    if precision != "16-mixed":  # which skips steps until the loss is scaled well
        assert losses[-1] == pytest.approx(expected[-1], rel=0.2)

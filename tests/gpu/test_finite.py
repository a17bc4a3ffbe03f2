"""A run whose loss is no number ends in that step."""

from pathlib import Path
from typing import Any

import pytest

from distillkit.callbacks import FiniteLoss
from distillkit.errors import TrainingError
from distillkit.losses import ForwardKL
from distillkit.types import LossOutput
from gpu.small import data_of, fit, module_of

pytestmark = pytest.mark.gpu


class Breaks(ForwardKL):
    """Is multiplied by `factor` from its third call on."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, *args: Any) -> LossOutput:
        output = super().forward(*args)
        self.calls += 1
        return LossOutput(output.total * (self.factor if self.calls > 2 else 1.0), output.units, output.metrics)


@pytest.mark.parametrize(("factor", "name"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_the_step_whose_loss_is_no_number_ends_the_run(
    factor: float, name: str, models: tuple[str, str], tmp_path: Path
) -> None:
    module, data = module_of(models, loss=Breaks(factor)), data_of(tmp_path / "data")
    with pytest.raises(TrainingError, match=f"The loss was {name} in step 3 on rank 0: lower the learning rate"):
        fit(tmp_path, module, data, [FiniteLoss()])
    assert module.loss.calls == 3


def test_a_run_of_numbers_goes_on(models: tuple[str, str], tmp_path: Path) -> None:
    log = fit(tmp_path, module_of(models, loss=Breaks(1.0)), data_of(tmp_path / "data"), [FiniteLoss()])
    assert len(log.column("train/loss")) == 4

"""Check that loss and gradient are finite."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from distillkit.errors import TrainingError

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule

_log = logging.getLogger(__name__)


class FiniteLoss(Callback):
    """Stops a run with an error at the first step whose loss or gradient is infinite or NaN, before the weights change.

    In `16-mixed` a gradient may overflow: its step is skipped and the loss scaled down. Such steps are counted as
    `train/skipped_steps`, and each 100 of them are reported. On a GPU the host waits once per step.
    """

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._loss: Tensor | None = None  # of the micro-batches of the step; its sum is finite if they are

    def on_before_backward(self, trainer: Trainer, pl_module: "RunModule", loss: Tensor) -> None:
        """Notes the loss of a micro-batch; the device is not waited for yet."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: "RunModule", optimizer: Optimizer) -> None:
        """Checks the loss of the step and its gradient.

        Raises:
            TrainingError: If one of them is not finite.
        """
        norm = pl_module.gradient_norm(optimizer)
        loss = norm.new_zeros(()) if self._loss is None else self._loss
        self._loss = None
        values = torch.stack([loss.double(), norm.double()])
        if torch.isfinite(values).all():  # the one wait
            return
        loss_value, norm_value = values.tolist()
        for name, value in (("loss", loss_value), ("gradient", norm_value)):
            if name == "gradient" and _skips_overflow(trainer):
                self._count_skipped(trainer)
            elif not torch.isfinite(torch.tensor(value)):
                raise TrainingError(
                    f"The {name} was {value} in step {trainer.global_step + 1} on rank {trainer.global_rank}: lower "
                    "the learning rate, or look at the loss and the responses of that step, which was not taken."
                )

    def _count_skipped(self, trainer: Trainer) -> None:
        self.skipped_steps += 1
        if self.skipped_steps % 100 == 0:
            _log.warning(
                "%d of %d steps were skipped, since their gradient overflowed in float16. Use trainer.precision "
                "bf16-mixed, or lower the learning rate.",
                self.skipped_steps,
                trainer.global_step + 1,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: "RunModule", *_: Any) -> None:
        """Logs the number of steps that were skipped, where steps may be."""
        if _skips_overflow(trainer):
            pl_module.log("train/skipped_steps", float(self.skipped_steps))

    def state_dict(self) -> dict[str, int]:
        """The number of steps that were skipped."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the number of steps that were skipped."""
        self.skipped_steps = state_dict["skipped_steps"]


def _skips_overflow(trainer: Trainer) -> bool:
    """True if the trainer skips steps whose gradient is not finite, and scales the loss down."""
    precision = trainer.precision_plugin
    return isinstance(precision, MixedPrecision) and precision.scaler is not None

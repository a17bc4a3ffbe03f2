"""Values that are logged of an optimizer step, and the few of them that a progress bar shows."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from distillkit.interfaces import Schedule
from distillkit.training.step_metrics import StepMeter, current_values, flatten
from distillkit.types import Summary


class StepLog:
    """Metrics of the loss, values of the schedules, learning rates and gradient norm of one optimizer step.

    All stay on the device: only a logger, or a progress bar at the interval of the loggers, waits for it.
    """

    def __init__(self) -> None:
        self.meter = StepMeter()
        self._summaries: dict[str, Summary] = {}
        self._values: dict[str, Tensor] = {}
        self._gradient_norm: Tensor | None = None

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the 2-norm of the gradient of this step, `[]`, computed once, before clipping.

        Args:
            optimizer: The optimizer, whose parameters have the gradient of the whole step.
        """
        if self._gradient_norm is None:
            gradients = [parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)
        return self._gradient_norm

    def note(self, optimizer: Optimizer) -> None:
        """Notes the gradient norm and the learning rates that the step is taken with."""
        self._values = {"grad_norm": self.gradient_norm(optimizer).detach(), **learning_rates(optimizer)}
        self._gradient_norm = None

    def clip(self, precision: Precision, optimizer: Optimizer, settings: Mapping[str, Any]) -> bool:
        """Clips the gradient in `bf16-mixed`, of a fused optimizer too; False if clipping is left to Lightning.

        Lightning refuses to clip for optimizers that unscale the gradient themselves. They do so only with a scaler,
        which `bf16-mixed` does not have.

        Args:
            precision: The trainer's precision plugin.
            optimizer: The optimizer, whose gradient is clipped in place.
            settings: `gradient_clip_val` and `gradient_clip_algorithm`, as Lightning's hook gets them.
        """
        if type(precision) is not MixedPrecision or precision.scaler is not None:
            return False
        value, algorithm = settings["gradient_clip_val"], settings["gradient_clip_algorithm"]
        if value and algorithm == GradClipAlgorithmType.VALUE:
            precision.clip_grad_by_value(optimizer, value)
        elif value:
            torch.nn.utils.clip_grads_with_norm_(parameters(optimizer), value, self._values["grad_norm"])
        return True

    def close(self, schedules: Mapping[str, Schedule]) -> dict[str, Summary]:
        """Ends the step, and returns the metrics of its loss over all micro-batches and ranks.

        Args:
            schedules: The schedules that are logged, with the values that the step was taken with.
        """
        self._summaries = self.meter.reduce()
        self._values |= current_values(schedules, self._summaries)
        return self._summaries

    def pop(self, schedules: Mapping[str, Schedule]) -> dict[str, Tensor]:
        """Returns the values of the step that has ended, `[]` each, by name; empty within a step."""
        values = {**flatten(self._summaries, schedules), **self._values}
        self._summaries, self._values = {}, {}
        return values


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, over all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rates(optimizer: Optimizer) -> dict[str, Tensor]:
    """Learning rates by the name under which they are logged, `[]` each.

    Args:
        optimizer: An optimizer. If its groups of parameters differ, each is logged under its `name`, or its index.
    """
    rates = [torch.as_tensor(group["lr"]).detach().clone() for group in optimizer.param_groups]
    if len({group["lr"] for group in optimizer.param_groups}) == 1:
        return {"lr": rates[0]}
    names = [str(group.get("name", index)) for index, group in enumerate(optimizer.param_groups)]
    return {f"lr/{name}": rate for name, rate in zip(names, rates, strict=True)}


def shows_values(trainer: Trainer) -> bool:
    """True after a step whose values a progress bar shows: at the interval of the loggers, as the host waits then."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return bool(trainer.progress_bar_callback and interval and trainer.global_step % interval == 0)


def shown_values(values: Mapping[str, Tensor], history: list[dict[str, float]]) -> dict[str, Tensor]:
    """The values that a progress bar shows, on the host and under short names: `loss`, `kl` and `lr`.

    Args:
        values: The values of a step.
        history: Held-out metrics of the validations so far.
    """
    shown = {name: value.float().cpu() for name, value in values.items() if name in ("loss", "lr")}
    divergence = history[-1].get("val/kl") if history else None
    return shown if divergence is None else shown | {"kl": torch.tensor(divergence)}

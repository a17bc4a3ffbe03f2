"""The optimizer of a resumed run: the state of the checkpoint with the settings of today."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from distillkit.devices.distributed import rank
from distillkit.errors import ConfigError

_log = logging.getLogger(__name__)


_FEW = 0.9
"""Share of the weights below which it is said that a step changes only these."""


def check_rounding(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """Warns if the weights are in half precision, and most steps would be lost in their rounding.

    Args:
        parameters: The parameters that are trained.
        optimizer: Their optimizer, set to the peak learning rate: about the size of a step of Adam.
    """
    half = [parameter.detach() for parameter in parameters if parameter.dtype in (torch.bfloat16, torch.float16)]
    total = sum(parameter.numel() for parameter in half)
    if not total:
        return
    rate = float(optimizer.param_groups[0]["lr"])
    changed = sum(int((parameter + rate != parameter).sum()) for parameter in half) / total
    if changed < _FEW and rank() == 0:
        _log.warning(
            "The student's weights are in %s: a step of the learning rate, %g, changes %.1f %% of them, and is lost in "
            "the rounding of the others. Use trainer.precision bf16-mixed with model.student.dtype float32, or a "
            "larger learning rate.",
            str(half[0].dtype).removeprefix("torch."),
            rate,
            100 * changed,
        )


def optimizer_identity(optimizer: OptimizerCallable) -> dict[str, Any]:
    """Class and settings of an optimizer, without a state.

    Args:
        optimizer: Makes the optimizer.
    """
    made = optimizer([nn.Parameter(torch.zeros(1, 1))])
    settings = {name: _plain(value) for name, value in made.param_groups[0].items() if name != "params"}
    return {"class": type(made).__qualname__, "settings": settings}


def apply_settings(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
    """Puts today's settings into the optimizer's state; torch would silently take those of the checkpoint.

    A learning rate is scaled where it is, so that its schedule goes on.

    Args:
        saved: The saved `optimizer_identity`.
        now: Today's.
        checkpoint: The checkpoint, changed in place.

    Raises:
        ConfigError: If the optimizer is of another class, whose state is another.
    """
    if now["class"] != saved["class"]:
        raise ConfigError(
            f"model.optimizer was {saved['class']} and is {now['class']}, which can't go on with the other's state. "
            "Set it as it was, or begin a new run with this one's student: model.student.source."
        )
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    for name, value in now["settings"].items():
        before = saved["settings"].get(name)
        if value == before:
            continue
        if rank() == 0:
            _log.warning(
                "Resumed with another value of model.optimizer.%s: it was %s and is %s, from step %d on.",
                name,
                before,
                value,
                checkpoint["global_step"],
            )
        if name != "lr":
            for group in groups:
                group[name] = value
        elif all("max_lr" not in group for group in groups):  # or the scheduler sets it
            _rescale(groups, checkpoint["lr_schedulers"], float(value), float(before or 0.0))


def refresh_rates(schedulers: Iterable[LRScheduler]) -> None:
    """Sets the learning rates to those of today's schedule at the current step.

    The rate in a checkpoint is that of the schedule of its run: at the end of a cosine it is 0, also where the resumed
    run is longer.

    Args:
        schedulers: The schedulers with the state of the checkpoint; those of torch's other classes keep their rates.
    """
    for scheduler in schedulers:
        if isinstance(scheduler, LambdaLR):
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


def _rescale(groups: list[dict[str, Any]], schedulers: list[dict[str, Any]], value: float, before: float) -> None:
    for group in groups:
        group["lr"] = group["lr"] * value / before if before else value
        if "initial_lr" in group:
            group["initial_lr"] = value
    for scheduler in schedulers:
        if "base_lrs" in scheduler:
            scheduler["base_lrs"] = [value] * len(scheduler["base_lrs"])


def _plain(value: object) -> object:
    return float(value) if isinstance(value, torch.Tensor) else value

"""The optimizer of a run, and of a resumed run: the state of the checkpoint with the settings of today."""

import logging
from collections.abc import Iterable, Mapping
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


def check_rounding(optimizer: Optimizer) -> None:
    """Warns if the weights are in half precision, and most steps would be lost in their rounding.

    Args:
        optimizer: The optimizer of the weights, set to the peak learning rate: about the size of a step of Adam.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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


_UNSUPPORTED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: (
        "it evaluates the loss several times in a step, from the last micro-batch alone where a step has several. Use "
        "AdamW or another optimizer with one gradient per step."
    ),
    torch.optim.SparseAdam: "the student's gradients are dense. Use Adam or AdamW.",
}
"""Optimizers that can't work, and why."""


def make_optimizer(factory: OptimizerCallable, model: nn.Module) -> Optimizer:
    """Calls the factory of an optimizer with the parameters of a model that are trained.

    A setting that is a tensor, such as a learning rate, is copied: a scheduler changes it in place, and the factory may
    be called again.

    Args:
        factory: Makes the optimizer.
        model: The model.

    Raises:
        ConfigError: If no parameter is trained, the optimizer refuses its settings or the parameters, or can't work.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("The student has no parameter that is trained: all are frozen. Call module.unfreeze().")
    try:
        optimizer = factory(parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.optimizer can't be made: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"model.optimizer must return an optimizer of torch, got {type(optimizer).__name__}.")
    for kind, reason in _UNSUPPORTED.items():
        if isinstance(optimizer, kind):
            raise ConfigError(f"model.optimizer: {type(optimizer).__name__} is not supported: {reason}")
    for group in optimizer.param_groups:
        group.update({name: value.clone() for name, value in group.items() if isinstance(value, torch.Tensor)})
    return optimizer


def optimizer_identity(optimizer: Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer, without a state.

    Args:
        optimizer: The optimizer as it was made, before a scheduler changes it.

    Returns:
        `class`, and for each parameter group its `settings` and in `sizes` its number of parameters.
    """
    groups = optimizer.param_groups
    settings = [{name: _plain(value) for name, value in group.items() if name != "params"} for group in groups]
    sizes = [len(group["params"]) for group in groups]
    return {"class": type(optimizer).__qualname__, "settings": settings, "sizes": sizes}


def expected_identity(factory: OptimizerCallable, model: nn.Module) -> dict[str, Any]:
    """The `optimizer_identity` of a run whose optimizer is not made yet, as that of a run that is being resumed.

    Args:
        factory: Makes the optimizer.
        model: The model that is trained.
    """
    return optimizer_identity(make_optimizer(factory, model))


def apply_settings(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
    """Puts today's settings into the optimizer's state; torch would silently take those of the checkpoint.

    A learning rate is scaled where it is, so that its schedule goes on.

    Args:
        saved: The saved `optimizer_identity`.
        now: Today's.
        checkpoint: The checkpoint, changed in place.

    Raises:
        ConfigError: If the optimizer is of another class, or has other parameter groups, whose state is another.
    """
    for name, text in (("class", ""), ("sizes", "with parameter groups of the sizes ")):
        if now[name] != saved[name]:
            raise ConfigError(
                f"model.optimizer was {text}{saved[name]} and is {now[name]}, which can't go on with the other's "
                "state. Set it as it was, or begin a new run with this one's student: model.student.source."
            )
    for index, (settings, saved_settings) in enumerate(zip(now["settings"], saved["settings"], strict=True)):
        suffix = f" of parameter group {index}" if len(now["settings"]) > 1 else ""
        groups = [state["param_groups"][index] for state in checkpoint["optimizer_states"]]
        for name, value in settings.items():
            before = saved_settings.get(name)
            if value == before:
                continue
            if rank() == 0:
                _log.warning(
                    "Resumed with another value of model.optimizer.%s%s: it was %s and is %s, from step %d on.",
                    name,
                    suffix,
                    before,
                    value,
                    checkpoint["global_step"],
                )
            if name != "lr":
                for group in groups:
                    group[name] = value
            elif all("max_lr" not in group for group in groups):  # or the scheduler sets it
                _rescale(groups, checkpoint["lr_schedulers"], index, float(value), float(before or 0.0))


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


def _rescale(
    groups: list[dict[str, Any]], schedulers: list[dict[str, Any]], index: int, value: float, before: float
) -> None:
    for group in groups:
        group["lr"] = group["lr"] * value / before if before else value
        if "initial_lr" in group:
            group["initial_lr"] = value
    for scheduler in schedulers:
        if "base_lrs" in scheduler:
            scheduler["base_lrs"][index] = value


def _plain(value: object) -> object:
    return float(value) if isinstance(value, torch.Tensor) else value

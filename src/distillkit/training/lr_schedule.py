"""Learning-rate schedules: warm-up, then constant, linear or cosine; or a scheduler of torch."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from distillkit.errors import ConfigError, check_range
from distillkit.training.optimizer_state import make_optimizer

Shape = Literal["constant", "linear", "cosine"]

ADAMW = functools.partial(torch.optim.AdamW, lr=2e-5, weight_decay=0.0)
"""Default optimizer."""

WARMUP = 0.05
"""Default fraction of the steps over which the learning rate grows from 0."""


def check_warmup(warmup: float | None, schedule: Shape | LRSchedulerCallable) -> float:
    """Returns the fraction of the steps over which the learning rate grows from 0.

    Args:
        warmup: The setting; None is `WARMUP` for a shape, and 0 for a scheduler, which has its own course.
        schedule: A shape, or a factory of a scheduler.

    Raises:
        ConfigError: If it is outside [0, 1), or set for a scheduler.
    """
    check_range("model.warmup", warmup, 0, 1, closed="left", note=", a fraction of the optimizer steps")
    if not callable(schedule):
        return WARMUP if warmup is None else warmup
    if warmup:
        raise ConfigError(
            f"model.warmup must be null where model.lr_schedule is a scheduler, got {warmup}: only the built-in shapes "
            "have a warm-up. Put it into the scheduler."
        )
    return 0.0


def check_schedule(optimizer: OptimizerCallable, schedule: Shape | LRSchedulerCallable) -> None:
    """Makes optimizer and scheduler for a parameter that is thrown away: wrong ones are refused before any model.

    Args:
        optimizer: A factory of the optimizer.
        schedule: A shape, or a factory of a scheduler.

    Raises:
        ConfigError: If the optimizer can't work; if the factory of a scheduler returns none, or one that waits for a
            metric; if the scheduler refuses its settings, can't be saved, or can't take a step.
    """
    try:
        trial = make_optimizer(optimizer, nn.Linear(1, 1, bias=False))
    except LookupError:  # it selects parameters of the student, which is not loaded yet
        return
    if not callable(schedule):
        return
    scheduler = make_scheduler(schedule, trial)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer step comes before it
            scheduler.step()
    except ArithmeticError as error:
        raise ConfigError(f"model.lr_schedule can't take a step: {type(error).__name__}: {error}") from error


def make_scheduler(schedule: LRSchedulerCallable, optimizer: Optimizer) -> LRScheduler:
    """Calls the factory of a scheduler.

    Raises:
        ConfigError: If it returns no scheduler, or one that waits for a metric; if the scheduler refuses its settings
            or can't be saved.
    """
    try:
        scheduler = schedule(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lr_schedule can't be made: {error}") from error
    except ArithmeticError as error:
        raise ConfigError(f"model.lr_schedule can't be made: {type(error).__name__}: {error}") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "model.lr_schedule can't be ReduceLROnPlateau: it waits for a metric, and the learning rate is set after "
            "each optimizer step. Use linear, cosine or another scheduler."
        )
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"model.lr_schedule must return a scheduler of torch, got {type(scheduler).__name__}.")
    try:
        scheduler.state_dict()
    except AttributeError as error:
        raise ConfigError(
            f"model.lr_schedule: {type(scheduler).__name__} can't be saved in a checkpoint ({error}). Use functions "
            "that are written in Python."
        ) from error
    return scheduler


def with_schedule(
    optimizer: Optimizer,
    schedule: Shape | LRSchedulerCallable,
    warmup: float,
    total: int | Callable[[int], float],
) -> OptimizerLRScheduler:
    """An optimizer with a learning-rate schedule, in the form that Lightning expects.

    Args:
        optimizer: The optimizer, set to the peak learning rate.
        schedule: Shape after the warm-up: constant, or decay to 0 (linear or half a cosine); or a scheduler's factory.
        warmup: Fraction of the steps over which the learning rate grows from 0, in [0, 1).
        total: Optimizer steps of the whole run; or, if their number is not known, a function from the steps done to the
            fraction of the run that is done.

    Raises:
        ConfigError: If the factory returns no scheduler that can be used, or one that ends before the run.
    """
    if callable(schedule):
        scheduler = make_scheduler(schedule, optimizer)
        if not callable(total):
            _require_steps(scheduler, total)
    elif callable(total):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(schedule, warmup, total(step)))
    else:
        from transformers import get_scheduler  # imported late: the command line starts faster

        name = "constant_with_warmup" if schedule == "constant" else schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=round(warmup * total), num_training_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _require_steps(scheduler: LRScheduler, steps: int) -> None:
    """Refuses a scheduler that raises an error within the steps of the run: one cycle can't be exceeded."""
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"model.lr_schedule: OneCycleLR has {scheduler.total_steps} steps (total_steps, or epochs × "
            f"steps_per_epoch), and the run takes {steps} optimizer steps. Set total_steps to {steps}."
        )
    starts = [0, *scheduler._milestones] if isinstance(scheduler, SequentialLR) else itertools.repeat(0)
    for part, start in zip(getattr(scheduler, "_schedulers", ()), starts, strict=False):
        _require_steps(part, steps - start)


def lr_factor(shape: Shape, warmup: float, fraction: float) -> float:
    """The factor in [0, 1] by which the peak learning rate is multiplied.

    Args:
        shape: Schedule after the warm-up: constant, or decay to 0 (linear or half a cosine).
        warmup: Fraction of the run over which the learning rate grows from 0, in [0, 1).
        fraction: Fraction of the run that is done, in [0, 1].
    """
    if fraction < warmup:
        return fraction / warmup
    remaining = 1.0 - (fraction - warmup) / (1.0 - warmup)
    return {"constant": 1.0, "linear": remaining, "cosine": 0.5 - 0.5 * math.cos(math.pi * remaining)}[shape]

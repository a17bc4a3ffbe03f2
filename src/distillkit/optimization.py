"""The shape of the learning rate over a run."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

Shape = Literal["constant", "linear", "cosine"]


def with_schedule(
    optimizer: torch.optim.Optimizer, shape: Shape, warmup: float, total: int | Callable[[int], float]
) -> OptimizerLRScheduler:
    """An optimizer whose learning rate grows from 0 and then follows a shape, as Lightning takes it.

    Args:
        optimizer: The optimizer, with its largest learning rate.
        shape: After the warm-up: constant, or down to 0 on a line or half a cosine.
        warmup: Share of the steps over which the learning rate grows from 0, in [0, 1).
        total: Optimizer steps of the whole run; or, for a run whose end is not known in steps, what gives the share of
            it that is done after so many steps.
    """
    if callable(total):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(shape, warmup, total(step)))
    else:
        from transformers import get_scheduler  # here, for a fast start of the command line

        name = "constant_with_warmup" if shape == "constant" else shape
        schedule = get_scheduler(name, optimizer, num_warmup_steps=round(warmup * total), num_training_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def share_of_rate(shape: Shape, warmup: float, fraction: float) -> float:
    """The share of its largest value that the learning rate has.

    Args:
        shape: After the warm-up: constant, or down to 0 on a line or half a cosine.
        warmup: Share of the run over which the learning rate grows from 0, in [0, 1).
        fraction: Share of the run that is done, in [0, 1].
    """
    if fraction < warmup:
        return fraction / warmup
    left = 1.0 - (fraction - warmup) / (1.0 - warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[shape]

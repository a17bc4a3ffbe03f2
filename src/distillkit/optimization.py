"""The shape of the learning rate over a run."""

from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

Shape = Literal["constant", "linear", "cosine"]


def with_schedule(optimizer: torch.optim.Optimizer, shape: Shape, warmup: float, total: int) -> OptimizerLRScheduler:
    """An optimizer whose learning rate grows from 0 and then follows a shape, as Lightning takes it.

    Args:
        optimizer: The optimizer, with its largest learning rate.
        shape: After the warm-up: constant, or down to 0 on a line or half a cosine.
        warmup: Share of the steps over which the learning rate grows from 0, in [0, 1).
        total: Optimizer steps of the whole run.
    """
    from transformers import get_scheduler  # here, for a fast start of the command line

    name = "constant_with_warmup" if shape == "constant" else shape
    schedule = get_scheduler(name, optimizer, num_warmup_steps=round(warmup * total), num_training_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

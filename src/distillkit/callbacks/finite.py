"""The end of a run whose loss is no number."""

from typing import Any

import torch
from lightning import Callback

from distillkit.errors import TrainingError


class FiniteLoss(Callback):
    """Ends a run with an error in the step whose loss is infinite or not a number.

    On a GPU it waits for each step, to look at its loss.
    """

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the loss.

        Raises:
            TrainingError: If it is not finite.
        """
        loss = outputs["loss"].detach()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss was {float(loss)} in step {trainer.global_step} on rank {trainer.global_rank}: lower the "
                "learning rate, or look at the loss and the responses of that step."
            )

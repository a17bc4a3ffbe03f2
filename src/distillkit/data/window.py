"""Which micro-batches form an optimizer step."""

from distillkit.errors import ConfigError
from distillkit.types import Batch


def step_window(batch: Batch, place: int, accumulate: int) -> tuple[Batch, ...] | None:
    """The micro-batches of the optimizer step that a batch begins; None within a step.

    Args:
        batch: The micro-batch whose turn it is.
        place: Its number in the epoch, from 0.
        accumulate: Micro-batches in an optimizer step; the last step of an epoch may have fewer.

    Raises:
        ConfigError: If the batch begins a step of several and does not carry the others along.
    """
    if batch.window is None and accumulate > 1 and place % accumulate == 0:
        raise ConfigError(
            "trainer.accumulate_grad_batches above 1 needs a loader that says which batches form a step: "
            "use DistillData, or give the first batch of each step its `window`."
        )
    return (batch,) if accumulate == 1 else batch.window

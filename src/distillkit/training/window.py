"""Optimizer-step windows: the micro-batches that form an optimizer step."""

from distillkit.errors import ConfigError, TrainingError
from distillkit.types import Batch


def require_batch(batch: object) -> None:
    """Checks what a data loader yields.

    Raises:
        ConfigError: If it is no `Batch`, as with several loaders at once or a loader of something else.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(
            f"The data loader yields {type(batch).__name__}, not a Batch: use DistillData, or one loader whose items "
            "are batches, such as those of distillkit.data.collate."
        )


class StepWindow:
    """The micro-batches of the current optimizer step, as the loader says and as Lightning runs them.

    The loss is divided by the units of all of them before the first gradient, so both must agree.
    """

    def __init__(self) -> None:
        self._size = 0
        self._trained: set[int] = set()  # indices in the epoch

    def add(self, batch: Batch, batch_index: int, accumulate: int) -> tuple[Batch, ...] | None:
        """Adds a micro-batch that is about to be trained on.

        Args:
            batch: The micro-batch.
            batch_index: Its index in the epoch, from 0.
            accumulate: Micro-batches per optimizer step; the last step of an epoch may have fewer.

        Returns:
            The micro-batches of the optimizer step that the batch starts; None within a step.

        Raises:
            ConfigError: If it is no `Batch`; if it starts a step of several micro-batches and its `window` is not set,
                or the other way round.
        """
        require_batch(batch)
        window, starts = (batch,) if accumulate == 1 else batch.window, batch_index % accumulate == 0
        if starts and window is None:
            raise ConfigError(
                "trainer.accumulate_grad_batches above 1 needs a loader that says which batches form a step: "
                "use DistillData, or give the first batch of each step its `window`."
            )
        if not starts and window is not None:
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {accumulate}, but batch {batch_index} has a `window`, so that a "
                "step would start with it: it must not change while a loader is used."
            )
        if window is None:
            self._trained.add(batch_index)
            return None
        self._size, self._trained = len(window), {batch_index}
        return window

    def close(self) -> None:
        """Checks that the optimizer step that was just taken is that of all micro-batches of the window.

        Raises:
            TrainingError: If it is not.
        """
        if len(self._trained) != self._size:
            raise TrainingError(
                f"An optimizer step was taken after {len(self._trained)} micro-batches, but the loss was divided for "
                f"the {self._size} that the loader announced. Give each first batch the `window` that the trainer runs "
                "(trainer.accumulate_grad_batches, limit_train_batches), or use DistillData."
            )

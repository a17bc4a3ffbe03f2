"""The place at which a run goes on: after its last optimizer step, whenever the checkpoint was saved."""

from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


@dataclass(frozen=True)
class Place:
    """The end of an optimizer step, or the start of an epoch.

    A checkpoint may be saved at any moment: inside the micro-batches of a step, at the start of a batch, in a
    validation, on an exception or a signal. Gradients are not saved, so the run goes on after the last step.

    Args:
        epoch: Index of the epoch.
        batches: Micro-batches of this epoch that were trained on, a whole number of optimizer steps.
        total_batches: The same over all epochs.
        validated: False if a validation that is due here has not been completed.
    """

    epoch: int
    batches: int
    total_batches: int
    validated: bool


def current_place(trainer: Trainer, validated: bool) -> Place:
    """The place of a trainer.

    Args:
        trainer: The trainer, in any state.
        validated: Whether the current weights have been validated.
    """
    epochs, epoch_loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
    batches, total = epoch_loop.batch_progress.current, epoch_loop.batch_progress.total
    assert isinstance(epochs, _ProcessedTracker)
    assert isinstance(batches, _ProcessedTracker)
    epoch, done = max(epochs.ready - 1, 0), batches.processed
    if epochs.started < epochs.ready:  # the counts of batches are still those of the epoch before
        return Place(epoch, 0, total.ready, True)
    if done < trainer.num_training_batches:
        done -= done % trainer.accumulate_grad_batches
        return Place(epoch, done, total.ready - (batches.ready - done), validated)
    data_fetcher = trainer.fit_loop._data_fetcher
    if not validated and data_fetcher is not None and epochs.processed < epochs.ready:
        validated = not epoch_loop._should_check_val_fx(data_fetcher)
        if not validated:
            return Place(epoch, done, total.ready, False)
    return Place(epoch + 1, 0, total.ready, True)


def restart_at(position: Place, fit_loop: dict[str, Any]) -> None:
    """Changes the saved state of Lightning's loop so that it goes on at a place.

    Lightning would resume inside a step, count a batch as trained on that was only fetched, leave out what remained of
    an epoch that was ended early, and finish a validation that had been interrupted without its first batches.

    Args:
        position: The place.
        fit_loop: State of the loop in the checkpoint, changed in place.
    """
    epochs = {
        "ready": position.epoch,
        "started": position.epoch,
        "processed": position.epoch,
        "completed": position.epoch,
    }
    if position.batches:
        epochs |= {"ready": position.epoch + 1, "started": position.epoch + 1}
    # A validation that was begun and of which no batch was counted is begun again; Lightning skips any other.
    begun = 0 if position.validated else 1
    validation = {"ready": begun, "started": begun, "processed": 0, "completed": 0}
    _set(fit_loop["epoch_progress"], epochs, epochs)
    _set(
        fit_loop["epoch_loop.batch_progress"],
        dict.fromkeys(epochs, position.batches),
        dict.fromkeys(epochs, position.total_batches),
    )
    _set(fit_loop["epoch_loop.val_loop.batch_progress"], validation, validation)


def _set(progress: dict[str, Any], current: dict[str, int], total: dict[str, int]) -> None:
    progress["current"], progress["total"] = dict(current), dict(total)
    if "is_last_batch" in progress:
        progress["is_last_batch"] = False

"""Errors of Lightning and of other ranks as one line, and settings of the trainer that contradict its callbacks."""

import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from distillkit.devices.distributed import rank, world_size
from distillkit.errors import ConfigError, DistillKitError, TrainingError

_log = logging.getLogger(__name__)

_SWITCHES: tuple[tuple[str, type[Callback]], ...] = (
    ("enable_checkpointing", Checkpoint),
    ("enable_progress_bar", ProgressBar),
    ("enable_model_summary", ModelSummary),
)


def enabled_callbacks(callbacks: Sequence[Callback], switches: dict[str, bool | None]) -> list[Callback]:
    """Returns the callbacks without those that a setting of the trainer switches off.

    A configuration takes its callbacks from its base; Lightning refuses one of a kind that is switched off.

    Args:
        callbacks: The callbacks of the configuration.
        switches: The trainer's settings by name, of which `barebones` and those that begin with `enable_` are read.
    """
    if switches.get("barebones"):  # which switches all of them off
        disabled = [("barebones", kind) for _, kind in _SWITCHES]
    else:
        disabled = [(name, kind) for name, kind in _SWITCHES if switches.get(name) is False]
    enabled = []
    for callback in callbacks:
        names = [name for name, kind in disabled if isinstance(callback, kind)]
        if names:
            value = "true" if names[0] == "barebones" else "false"
            _log.info("trainer.%s is %s: %s is left out.", names[0], value, type(callback).__name__)
        else:
            enabled.append(callback)
    return enabled


@contextmanager
def explained_trainer() -> Iterator[None]:
    """Turns what Lightning raises for a trainer that can't be made into one line.

    Raises:
        ConfigError: If a strategy, an accelerator, a device or a plugin is unknown, missing or does not fit the others.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"trainer: Lightning can't make it with these settings: {_one_line(error)}") from error


@contextmanager
def explained_run() -> Iterator[None]:
    """Turns what Lightning and torch raise for a run that can't work, or whose other rank failed, into one line.

    Raises:
        ConfigError: If a setting of the trainer or of a callback contradicts another one.
        TrainingError: If another rank has failed.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _is_of_other_rank(error):
            raise TrainingError(
                f"Rank {rank()} stopped because another rank did, whose own error is the one to look at."
            ) from error
        if _is_raised_by_lightning(error):
            raise ConfigError(f"Lightning refuses the settings of trainer: {_one_line(error)}") from error
        raise


def check_launcher(trainer: Trainer) -> None:
    """Refuses a strategy that copies the command into new processes, which its configuration can't be.

    Args:
        trainer: The trainer of the command.

    Raises:
        ConfigError: If the strategy spawns its processes.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method == "spawn":
        raise ConfigError(
            "trainer.strategy: ddp_spawn can't be used on the command line, since its processes do not get the "
            "configuration. Use ddp."
        )


_OF_TYPE = re.compile(
    r"- (Expected|Unexpected|Not a valid|Problem with|Import path|Does not validate|a class path|a dict )"
)
"""Reasons of jsonargparse that only say that a value has another type."""


def reason_of(error: Exception) -> BaseException:
    """The reason why a class was not made: the `DistillKitError` that caused `error`, or what the class says itself.

    Of a setting of several types, jsonargparse passes on the error of the first type, and the others' as text. `error`
    is returned if there is no reason, such as for a fault of the class.

    Args:
        error: What jsonargparse raised.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    raised = next((cause for cause in causes if isinstance(cause, DistillKitError)), None)
    if raised is not None:
        return raised
    refused, reasons = refused_by_class(causes[-1]), []
    if str(error).startswith("Does not validate against any of the Union subtypes"):
        lines = (line.strip() for line in str(error).splitlines())
        reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and not _OF_TYPE.match(line)]
    if reasons and (refused is None or reasons[0] not in str(refused)):
        return ConfigError("; ".join(dict.fromkeys(reasons)))
    return refused or error


def refused_by_class(error: BaseException) -> ConfigError | None:
    """The reason why a class refuses its settings, as one line; None for any other error, such as a bug of the class.

    Args:
        error: What was raised when the class was made.
    """
    if not isinstance(error, MisconfigurationException | ValueError | ImportError):
        return None
    frames = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    name = next((frame.partition(".")[0] for frame in reversed(frames) if frame.endswith(".__init__")), "A class")
    return ConfigError(f"{name} refuses its settings: {_one_line(error)}")


def _is_raised_by_lightning(error: Exception) -> bool:
    """True if Lightning itself raises the error, and not what it calls."""
    *_, raising = traceback.extract_tb(error.__traceback__)
    return Path(raising.filename).is_relative_to(Path(lightning.__file__).parent)


def _is_of_other_rank(error: RuntimeError) -> bool:
    """True if a collective failed since another process has ended."""
    if world_size() == 1:
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in signs)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

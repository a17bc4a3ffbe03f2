"""Settings of the trainer that would change a run's mathematics or do nothing, refused before any model is loaded."""

import logging
from collections.abc import Collection

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from distillkit.devices.distributed import rank
from distillkit.errors import ConfigError, check_range
from distillkit.evaluation.heldout import GOLD_NAMES
from distillkit.types import Prompts

_log = logging.getLogger(__name__)

_CALLBACKS: dict[type, str] = {
    StochasticWeightAveraging: "it copies the module before the student is loaded, and averages nothing. Leave it out.",
    WeightAveraging: (
        "it averages the schedules with the weights, and has the answers of a validation generated without the "
        "average. Leave it out."
    ),
    ModelPruning: (
        "it looks for parameters before the student is loaded. Leave it out, or remove layers with "
        "model.student.keep_layers."
    ),
    GradientAccumulationScheduler: (
        "rounds and schedules count optimizer steps of one size. Set trainer.accumulate_grad_batches."
    ),
    LearningRateFinder: "its search would be part of the training. Set the learning rate in model.optimizer.",
    BatchSizeFinder: (
        "its trials would generate responses and be part of the training. Set data.batch_size and "
        "trainer.accumulate_grad_batches."
    ),
    BaseFinetuning: (
        "it looks for layers to freeze before the student is loaded. Train adapters with model.student.lora instead."
    ),
}
"""Callbacks that can't work, and why; the first that fits is named."""


_RANGES = ("accumulate_grad_batches", "check_val_every_n_epoch", "gradient_clip_val", "val_check_interval")
"""Numbers that Lightning takes as they are: a 0 or a number below it is an error after hours, or does nothing."""


_LARGER_IS_BETTER = {
    "kl": False,
    "nll": False,
    "acceptance": True,
    "rouge_l": True,
    "gold_nll": False,
    "gold_rouge_l": True,
    "loss": False,
}
"""Held-out metrics, and whether a larger value is the better one."""


def check_trainer(trainer: Trainer, metrics: Collection[str]) -> None:
    """Checks the numbers, the strategy and the callbacks of a trainer.

    Args:
        trainer: The trainer, before anything is loaded.
        metrics: Names of the held-out metrics of the run, without `val/`.

    Raises:
        ConfigError: If a number is out of range, the strategy shards the model or does not fit the accumulation, or a
            callback can't work with a student that is loaded late or monitors a metric that there won't be.
    """
    for name in _RANGES:
        value = getattr(trainer, name)
        if isinstance(value, int | float):
            is_clip = name == "gradient_clip_val"  # 0 is a way to leave it out
            check_range(f"trainer.{name}", value, 0, closed="left" if is_clip else "neither")
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} is not supported, since models can't be sharded over devices "
            "yet. Use `ddp` for several devices, or `auto`."
        )
    is_static = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph")
    if is_static and trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            "trainer.strategy: static_graph can't be used with trainer.accumulate_grad_batches above 1: torch fails in "
            "the micro-batches that don't synchronize. Leave static_graph out."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it through a connector
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} is not supported: {reason}")
        monitor = getattr(callback, "monitor", None)
        if trainer.state.fn == "fit" and isinstance(monitor, str) and monitor.startswith("val/"):
            _check_monitor(callback, monitor.removeprefix("val/"), metrics, trainer)


def check_gold_monitors(trainer: Trainer, prompts: Prompts, has_teacher: bool, has_loss: bool) -> None:
    """Refuses a callback that monitors a metric of the data's own held-out answers where there will be none.

    Args:
        trainer: The trainer.
        prompts: The held-out prompts.
        has_teacher: Whether there is a teacher with the student's tokenizer, which answers every prompt.
        has_loss: Whether the loss can be taken on single responses, and its teacher has the student's tokenizer.
    """
    needed = "responses in data.val" if has_teacher else "a teacher with the student's tokenizer"
    has_gold = has_teacher and any(prompt.reference_ids for prompt in prompts)
    missing = {} if has_gold else dict.fromkeys(("gold_nll", "gold_rouge_l"), needed)
    if not has_loss:
        missing["loss"] = "a loss that compares models on each response by itself"
    elif has_teacher and not has_gold:
        missing["loss"] = needed
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it through a connector
        monitor = str(getattr(callback, "monitor", None))
        reason = missing.get(monitor.removeprefix("val/")) if monitor.startswith("val/") else None
        if reason is not None:
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor}, which needs {reason}. "
                "Monitor another metric, such as val/nll."
            )


def _check_monitor(callback: Callback, metric: str, metrics: Collection[str], trainer: Trainer) -> None:
    """Checks that a callback monitors a metric of the run in the right direction; one logged elsewhere may be any."""
    name, kind = f"val/{metric}", type(callback).__name__
    sources = getattr(trainer.datamodule, "sources", {"val": ""})  # type: ignore[attr-defined]  # set by a connector
    is_ours = metric in metrics or metric in _LARGER_IS_BETTER
    if is_ours and sources.get("val") is None:
        raise ConfigError(
            f"trainer.callbacks: {kind} monitors {name}, and there are no held-out prompts: set data.val."
        )
    logged = ", ".join(f"val/{one}" for one in metrics)
    if is_ours and metric not in (*metrics, *GOLD_NAMES):
        raise ConfigError(
            f"trainer.callbacks: {kind} monitors {name}, which needs a teacher with the student's tokenizer. This run "
            f"logs {logged}."
        )
    if rank() != 0:
        return
    if not is_ours:
        _log.warning(
            "trainer.callbacks: %s monitors %s. A run logs %s; another metric must be logged by a callback of yours.",
            kind,
            name,
            logged,
        )
    larger, mode = _LARGER_IS_BETTER.get(metric), getattr(callback, "mode", None)
    if larger is not None and mode == ("min" if larger else "max"):
        better = ("larger", "max") if larger else ("smaller", "min")
        _log.warning(
            "trainer.callbacks: %s takes the %s of %s for the best, and a %s one is better: set its mode to %s.",
            kind,
            mode,
            name,
            *better,
        )


def total_steps(trainer: Trainer) -> int:
    """Number of optimizer steps of a run.

    Raises:
        ConfigError: If training has no end.
    """
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ConfigError("Training has no end: set trainer.max_epochs, trainer.max_steps, or a Budget.")
    return int(total)

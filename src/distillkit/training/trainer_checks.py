"""Settings of the trainer that would change a run's mathematics or do nothing, refused before any model is loaded."""

from lightning import Trainer
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

from distillkit.errors import ConfigError

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


def check_trainer(trainer: Trainer) -> None:
    """Checks the strategy and the callbacks of a trainer.

    Args:
        trainer: The trainer, before anything is loaded.

    Raises:
        ConfigError: If the strategy shards the model, or a callback can't work with a student that is loaded late.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} is not supported, since models can't be sharded over devices "
            "yet. Use `ddp` for several devices, or `auto`."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it through a connector
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} is not supported: {reason}")

"""Check of a configuration: parses it, builds its parts and reads its data, without loading a model."""

from lightning import Trainer

from distillkit.config.files import MergedConfig
from distillkit.training.datamodule import DistillData
from distillkit.training.module import DistillModule
from distillkit.workflows.launch import DistillCLI, launch_merged


def check(config: MergedConfig) -> None:
    """Parses a configuration, builds its parts and reads its data; loads no model.

    Args:
        config: The configuration of a run.

    Raises:
        ConfigError: If a key or a value is wrong.
        DataError: If the data is missing or malformed.
    """
    launch_merged(CheckCLI, "check", config, trainer_class=CheckTrainer)


class CheckTrainer(Trainer):
    """A trainer that only reads the data."""

    def check(self, model: DistillModule, datamodule: DistillData) -> None:
        """Reads the data.

        Args:
            model: The models.
            datamodule: The prompts.
        """
        datamodule.prepare_data()


class CheckCLI(DistillCLI):
    """Command line of the verb `check`, with the same configuration as `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb `check`."""
        return {"check": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """The trainer, without loggers."""
        return super().instantiate_trainer(logger=False, **kwargs)

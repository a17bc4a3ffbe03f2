"""A run's configuration, parsed and its parts made, and no more."""

from typing import Any

from lightning import Trainer

from distillkit.cli.train import DistillCLI, launch
from distillkit.data.module import DistillData
from distillkit.module import DistillModule


def check(path: str) -> None:
    """Parses the configuration in a file, makes its parts, and reads its data; loads no model.

    Raises:
        ConfigError: If a key or a value is wrong.
        DataError: If the data is missing or malformed.
    """
    launch(CheckCLI, "check", ["--config", path], trainer_class=CheckTrainer, save_config_callback=None)


class CheckTrainer(Trainer):
    """A trainer that reads the data and trains nothing."""

    def check(self, model: DistillModule, datamodule: DistillData) -> None:
        """Reads the data.

        Args:
            model: The models.
            datamodule: The prompts.
        """
        datamodule.prepare_data()


class CheckCLI(DistillCLI):
    """The same configuration as that of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one verb."""
        return {"check": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer without logs."""
        return super().instantiate_trainer(logger=False, **kwargs)

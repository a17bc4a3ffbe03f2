"""The verbs `fit`, `validate` and `test`, on LightningCLI."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.logging import RichHandler

import distillkit.callbacks
import distillkit.generators.magpie  # noqa: F401  the classes of both are found by their short names
from distillkit.cli import configs
from distillkit.cli.explain import Command, explain
from distillkit.data.module import DistillData
from distillkit.errors import ConfigError, DistillKitError
from distillkit.hardware import default_device, multiplies
from distillkit.models.student import Student
from distillkit.module import DistillModule

_command = Command()  # what this process was asked for: jsonargparse's messages don't say where a fault is


_FIT_ONLY = ("ckpt_path", "weights_only")


def run(verb: str, arguments: list[str]) -> int:
    """Runs `verb` with the arguments that follow it.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    launch(DistillCLI, verb, arguments, save_config_callback=SaveConfig)
    return 0


def launch(
    cli: "type[DistillCLI]",
    verb: str,
    arguments: list[str],
    adapt: Callable[[configs.Config], configs.Config] = lambda config: config,
    **settings: Any,
) -> "DistillCLI":
    """Runs a verb of `cli`.

    Args:
        cli: Parses the configuration and runs the verb.
        verb: The verb.
        arguments: The arguments that follow it.
        adapt: Changes the merged configuration before it is parsed.
        settings: Further arguments of LightningCLI.

    Returns:
        The command line, when the verb is done.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")  # Lightning's own, about torch's pytree
    files, rest = configs.split_arguments(arguments)
    merged = adapt(configs.load_all(files))
    # A saved configuration has these, and a verb may have no such argument: they don't matter where they say nothing.
    merged = {key: value for key, value in merged.items() if value is not None or key not in _FIT_ONLY}
    _command.config, _command.arguments = merged, rest
    _command.classes = [*configs.named_parts(merged, rest), DistillModule, DistillData, Student, Trainer]
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "merged.yaml"
        resolved.write_text(yaml.safe_dump(merged, sort_keys=False))
        return cli(
            DistillModule,
            DistillData,
            args=[verb, *([f"--config={resolved}"] if files else []), *rest],
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": -1, "default_root_dir": "runs/default", "log_every_n_steps": 10},
            parser_kwargs={"allow_abbrev": False},
            **settings,
        )


class Parser(LightningArgumentParser):
    """Turns a parser's complaint into one line with a suggestion."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing the usage and leaving."""
        raise ConfigError(explain(message, _command)) from None


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration beside the run."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing yet: a run that is refused must not leave a folder that looks like a run."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Writes `config.yaml` into the run's folder."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config["ckpt_path"] = None  # a checkpoint to go on from is not part of what the run is
            self.parser.save(config, path, skip_unset=False, overwrite=True, multifile=False)


class DistillCLI(LightningCLI):
    """LightningCLI with this project's run folder, loggers and early checks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the arguments of theirs that are not settings."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that accepts no abbreviated key."""
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses what `run` prepared."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Refuses to write into another run's folder, and sets up the log on the terminal."""
        is_first_rank = getattr(rank_zero_only, "rank", 0) == 0
        handler = RichHandler(show_path=False, show_level=False, log_time_format="[%X]")
        log = logging.getLogger("distillkit")
        log.handlers, log.propagate = [handler], False
        lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        lightning_log.addFilter(lambda record: "Tip:" not in record.getMessage())
        log.setLevel(logging.INFO if is_first_rank else logging.WARNING)
        root, resuming = Path(self._get(self.config, "trainer").default_root_dir), self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and is_first_rank and not resuming and (root / "config.yaml").exists():
            raise ConfigError(
                f"The run folder {root} holds a run already: go on with it by --ckpt_path last, "
                "or name another by --trainer.default_root_dir."
            )

    def instantiate_classes(self) -> None:
        """The parts; what one of them has against its settings is said as it says it."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, about a setting that may also be null
            raise _own_error(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, with CSV and TensorBoard logs in the run's folder unless other loggers are configured."""
        trainer = self._get(self.config_init, "trainer")
        kwargs |= _runnable_precision(trainer.accelerator, trainer.precision)
        if "logger" not in kwargs and trainer.logger in (None, True):
            root = trainer.default_root_dir
            table = CSVLogger(root, name="csv", flush_logs_every_n_steps=1)
            kwargs["logger"] = [table, TensorBoardLogger(root, name="tensorboard")]
        return super().instantiate_trainer(**kwargs)


def _own_error(error: Exception) -> Exception:
    """The error of ours that another one comes from; that one if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DistillKitError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _runnable_precision(accelerator: Any, precision: Any) -> dict[str, str]:
    """Float32 in place of bfloat16 where the run is on a processor that has no instructions for it; the log says so."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and default_device().type == "cpu")
    if precision not in ("bf16-mixed", "bf16-true") or not on_cpu or multiplies(torch.bfloat16, torch.device("cpu")):
        return {}
    logging.getLogger("distillkit").info(
        "trainer.precision: this processor has no instructions for bfloat16, so %s becomes 32-true", precision
    )
    return {"precision": "32-true"}

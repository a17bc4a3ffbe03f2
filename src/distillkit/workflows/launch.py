"""Command line of the verbs `fit`, `validate` and `test`, built on LightningCLI."""

import copy
import json
import logging
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only

# Imported so that configurations can name these classes by their short names.
from distillkit.callbacks import Answers, Budget, Export, FiniteLoss, RunCheckpoint, Throughput  # noqa: F401
from distillkit.callbacks.defaults import add_default_callbacks
from distillkit.config.command import Command, with_flag_values, with_source_paths
from distillkit.config.explain import explain
from distillkit.config.files import SOURCES, Config, MergedConfig, as_source, load_all, require_mapping, split_arguments
from distillkit.config.hyperparameters import describe
from distillkit.config.parts import import_parts
from distillkit.devices.precision import default_device, has_native_matmul
from distillkit.errors import ConfigError, check_range
from distillkit.run_folder import CONFIG, CSV_LOGS, FITTED, RESPONSES, RUN_LOG, SCHEDULES, TENSORBOARD_LOGS
from distillkit.storage.atomic import atomic_path, write_atomically
from distillkit.storage.checkpoint_io import use_atomic_checkpoints
from distillkit.storage.locks import FolderLock
from distillkit.training.datamodule import DistillData
from distillkit.training.lr_schedule import ADAMW
from distillkit.training.module import DistillModule
from distillkit.workflows.checkpoints import requeued, resolve_checkpoint
from distillkit.workflows.full_help import PublicPartsFormatter, print_full_help
from distillkit.workflows.logs import run_log
from distillkit.workflows.refusals import (
    check_launcher,
    enabled_callbacks,
    explained_run,
    explained_trainer,
    reason_of,
)
from distillkit.workflows.signals import SignalCallback
from distillkit.workflows.stopped import saved_work
from distillkit.workflows.tensorboard import RunTensorBoardLogger

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
    adapt: Callable[[Config], Config] = lambda config: config,
    trainer_class: type[Trainer] = Trainer,
    save_config_callback: type[SaveConfigCallback] | None = None,
) -> "DistillCLI":
    """Runs a verb.

    Args:
        cli: Class that parses the configuration and runs the verb.
        verb: Name of the verb.
        arguments: Command-line arguments after the verb.
        adapt: Function that changes the merged configuration before it is parsed.
        trainer_class: Class of the trainer, which has a method for the verb.
        save_config_callback: Callback that saves the resolved configuration; None saves nothing.

    Returns:
        The `cli` object, after the verb has run.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    files, rest = split_arguments(arguments)
    return launch_merged(cli, verb, load_all(files), rest, adapt, trainer_class, save_config_callback)


def launch_merged(
    cli: "type[DistillCLI]",
    verb: str,
    config: MergedConfig,
    arguments: Sequence[str] = (),
    adapt: Callable[[Config], Config] = lambda config: config,
    trainer_class: type[Trainer] = Trainer,
    save_config_callback: type[SaveConfigCallback] | None = None,
) -> "DistillCLI":
    """Runs a verb with config files that are merged already; otherwise like `launch`.

    Args:
        cli: Class that parses the configuration and runs the verb.
        verb: Name of the verb.
        config: The merged config files.
        arguments: Command-line arguments without the config files.
        adapt: Function that changes the merged configuration before it is parsed.
        trainer_class: Class of the trainer, which has a method for the verb.
        save_config_callback: Callback that saves the resolved configuration; None saves nothing.
    """
    warnings.filterwarnings(
        "ignore", r".*isinstance\(treespec, LeafSpec\).*"
    )  # raised inside Lightning, about torch's pytree
    roots = {"model": DistillModule, "data": DistillData, "trainer": trainer_class}
    for key in roots:
        require_mapping(config, key)
    # A saved configuration contains these keys, which not every verb accepts: null values are dropped.
    content = {key: value for key, value in adapt(config.content).items() if value is not None or key not in _FIT_ONLY}
    for key in SOURCES:  # an argument below a path sets something else of that source
        data = content.get("data")
        if isinstance(data, dict) and any(argument.startswith(f"--data.{key}.") for argument in arguments):
            content["data"] = {**data, **({key: as_source(data[key])} if key in data else {})}
    arguments = with_source_paths(with_flag_values(arguments, getattr(trainer_class, verb)))
    command = Command(MergedConfig(content, config.files), tuple(arguments), roots)
    import_parts(command)
    return cli(command, [verb, *arguments], trainer_class, save_config_callback)


def datamodule_of(trainer: Trainer) -> DistillData:
    """The run's data module, which Lightning attaches to the trainer."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it through a connector
    assert isinstance(datamodule, DistillData)
    return datamodule


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration, and the names of the schedules that are logged, in the run's folder.

    The folder is locked while the run trains.
    """

    _lock: FolderLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the run's folder. Writes nothing yet: a run that fails its checks must not look like a run.

        Raises:
            ConfigError: If another process trains in the folder.
        """
        if stage == "fit" and trainer.is_global_zero:
            self._lock = FolderLock(trainer.default_root_dir)
            self._lock.acquire()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees the run's folder."""
        if self._lock is not None:
            self._lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Frees the run's folder."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `config.yaml` and `schedules.json` into the run's folder, unless it is a run with `fast_dev_run`."""
        assert isinstance(pl_module, DistillModule)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            path = Path(trainer.default_root_dir) / CONFIG
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(FITTED).unlink(missing_ok=True)
            config = self.config.clone()
            config["ckpt_path"] = None  # the checkpoint to resume from is not part of the run's configuration
            with atomic_path(path) as temporary:
                self.parser.save(config, temporary, skip_unset=False, overwrite=True, multifile=False)
            write_atomically(path.with_name(SCHEDULES), json.dumps(list(pl_module.schedules)).encode())


class DistillCLI(LightningCLI):
    """LightningCLI with this project's run folder, loggers and early checks.

    Args:
        command: The command, to parse its config files.
        arguments: The verb and the command's other arguments.
        trainer_class: Class of the trainer, which has a method for the verb.
        save_config_callback: Callback that saves the resolved configuration; None saves nothing.
    """

    def __init__(
        self,
        command: Command,
        arguments: list[str],
        trainer_class: type[Trainer],
        save_config_callback: type[SaveConfigCallback] | None,
    ) -> None:
        self.command, self.verb, self.start = command, arguments[0], time.monotonic()
        super().__init__(
            DistillModule,
            DistillData,
            args=arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": -1, "default_root_dir": "runs/default", "log_every_n_steps": 10},
            trainer_class=trainer_class,
            save_config_callback=save_config_callback,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, each with the arguments of its method that are not settings."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that rejects abbreviated keys, raises its errors, and takes the merged config files."""
        parser = self.parser_class(
            prog="distillkit", allow_abbrev=False, exit_on_error=False, formatter_class=PublicPartsFormatter, **kwargs
        )
        parser.add_argument(
            "-c",
            "--config",
            action=_merged_files(self.command),
            help="path of a config file; of several, later ones override earlier ones",
        )
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The parser of the command's verb; those of other verbs, which would take a second each, remain empty."""
        if subcommand == self.verb:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets the default optimizer by its settings, which a configuration may replace one by one."""
        parser.set_defaults({"model.optimizer": describe(ADAMW)})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the config files and the arguments over them, or prints the help that they ask for.

        Raises:
            ConfigError: If a key or a value is wrong.
            SystemExit: After help.
        """
        assert isinstance(args, list)
        print_full_help(self._subcommand_parsers[self.verb], self.verb, args)
        verb, files = args[0], ["--config", "merged"] if self.command.config.content else []
        with _explained(self.command):
            self.config = parser.parse_args([verb, *files, *args[1:]])
        settings, located = self.config[verb], self.command.located
        check_range(located("seed_everything"), settings.seed_everything, 0, 2**32 - 1)
        if settings.trainer.default_root_dir is None:
            raise ConfigError(f"{located('trainer.default_root_dir')} is null. Name the run's folder, or leave it out.")

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would replace the settings of the command by those that the checkpoint records."""

    def before_instantiate_classes(self) -> None:
        """Checks that the run has an end, and that its folder is free.

        Raises:
            ConfigError: If nothing says when training ends, or the folder contains a run already.
        """
        is_first_rank = getattr(rank_zero_only, "rank", 0) == 0
        trainer = self._get(self.config, "trainer")
        root, resuming = Path(trainer.default_root_dir), self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and not trainer.fast_dev_run:
            self._require_end(trainer)
        with explained_trainer():  # SLURM's variables may not fit
            resuming = resuming or requeued(root) or trainer.fast_dev_run  # which leaves the run's files as they are
        if self.subcommand == "fit" and is_first_rank and not resuming and (root / CONFIG).exists():
            raise ConfigError(
                f"The run folder {root} contains a run already. Resume it with --ckpt_path last, or choose another "
                "folder with --trainer.default_root_dir."
            )

    def _require_end(self, trainer: Namespace) -> None:
        """Refuses a run that Lightning would let go on for 1000 epochs, or to which a time alone gives no schedule."""
        if trainer.max_epochs is None and trainer.max_steps == -1:
            raise ConfigError(
                "trainer.max_epochs must be set, or trainer.max_steps: the schedules run to the end of training. For a "
                "limit in seconds or tokens use the callback Budget with max_epochs: -1."
            )

    def instantiate_classes(self) -> None:
        """Builds the parts.

        Raises:
            DistillKitError: If a part refuses its settings; its own error where it raises one.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:  # from jsonargparse, about a setting that may also be of another type
            raise reason_of(error) from None

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """The trainer, with CSV and TensorBoard logs in the run's folder unless other loggers are configured."""
        trainer = self._get(self.config_init, "trainer")
        kwargs |= _runnable_precision(trainer.accelerator, trainer.precision)
        if trainer.barebones:  # which refuses even the defaults of a run
            kwargs |= dict.fromkeys(("num_sanity_val_steps", "log_every_n_steps"))
        elif "logger" not in kwargs and trainer.logger in (None, True):
            root = trainer.default_root_dir
            table = CSVLogger(root, name=CSV_LOGS, flush_logs_every_n_steps=1)
            kwargs["logger"] = [table, RunTensorBoardLogger(root, TENSORBOARD_LOGS)]
        built = super().instantiate_trainer(**kwargs)
        check_launcher(built)
        add_default_callbacks(built, self.model.export and self.subcommand == "fit")
        use_atomic_checkpoints(built)
        built.callbacks.insert(0, SignalCallback())  # type: ignore[attr-defined]  # first, to defer signals to a step's end
        return built

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer, without the callbacks that its settings switch off."""
        configured = config.get("callbacks") or []
        config["callbacks"] = enabled_callbacks(configured if isinstance(configured, list) else [configured], config)
        with explained_trainer():
            return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        """The arguments of the verb, with the path of its checkpoint."""
        arguments: dict[str, object] = super()._prepare_subcommand_kwargs(subcommand)
        path = arguments.get("ckpt_path")
        if "ckpt_path" in arguments:
            arguments["ckpt_path"] = resolve_checkpoint(self.trainer, None if path is None else str(path), subcommand)
        return arguments

    def after_fit(self) -> None:
        """Marks the run as complete, if training came to its end."""
        is_short = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector
        is_finished = self.trainer.state.status == TrainerStatus.FINISHED
        if self.trainer.is_global_zero and is_finished and not is_short:
            content = json.dumps({"wall_seconds": round(time.monotonic() - self.start, 1)})
            write_atomically(Path(self.trainer.default_root_dir) / FITTED, content + "\n")

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the verb; what Lightning refuses, and that another rank failed, is one line."""
        is_logged, root = subcommand == "fit" and self.trainer.is_global_zero, Path(self.trainer.default_root_dir)
        log = run_log(root / RUN_LOG) if is_logged else nullcontext()
        with saved_work(root, self.model.store or root / RESPONSES, subcommand), explained_run(), log:
            super()._run_subcommand(subcommand)


def _merged_files(command: Command) -> type[ActionConfigFile]:
    """The action of `--config`: applies the content of the config files, which are merged already."""

    class MergedFiles(ActionConfigFile):  # type: ignore[misc]  # jsonargparse has no types
        def __call__(
            self, parser: LightningArgumentParser, cfg: Namespace, values: str, option_string: str | None = None
        ) -> None:
            content = copy.deepcopy(command.config.content)
            for key, value in content.items():
                if value == {} and key not in command.roots:
                    content[key] = {key: None}  # the parser would pass over an unknown key without a value
            _replace_classes(cfg, content)
            with _explained(replace(command, arguments=())):
                cfg.update(parser.parse_object(content, cfg, env=False, defaults=False))

    return MergedFiles


def _replace_classes(defaults: Namespace, content: Config, path: str = "") -> None:
    """Removes the default arguments of each part whose class the config files replace: they belong to another class."""
    for key, value in content.items():
        name = f"{path}{key}"
        if not isinstance(value, dict):
            continue
        if "class_path" not in value:
            _replace_classes(defaults, value, f"{name}.")
            continue
        default = defaults.get(name)
        if isinstance(default, Namespace) and default.get("class_path") != value["class_path"]:
            defaults[name] = Namespace(class_path=value["class_path"])


@contextmanager
def _explained(command: Command) -> Iterator[None]:
    """Turns the parser's errors into one line each."""
    try:
        yield
    except ArgumentError as error:
        raise ConfigError(explain(str(error), command)) from None


def _runnable_precision(accelerator: object, precision: object) -> dict[str, str]:
    """Trainer settings that replace bfloat16 by float32 on a CPU without bfloat16 instructions; empty otherwise."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and default_device().type == "cpu")
    if (
        precision not in ("bf16-mixed", "bf16-true")
        or not on_cpu
        or has_native_matmul(torch.bfloat16, torch.device("cpu"))
    ):
        return {}
    logging.getLogger("distillkit").info(
        "trainer.precision: this CPU has no bfloat16 instructions, so %s becomes 32-true", precision
    )
    return {"precision": "32-true"}

"""The settings of a run, as its loggers get them."""

import functools
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from distillkit import DistillData, DistillModule, Lora, Sampling, Student
from distillkit.cli.main import main
from distillkit.curators.single import DatasetCurator
from distillkit.losses import SkewKL
from distillkit.teachers.transformers import TransformersTeacher
from helpers.runs import QUIET, command, save_models, write_config, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loggers")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    write_prompts(root / "val.jsonl", 2, response=True)
    return root


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


def config(folder: Path, run: str, **trainer: Any) -> str:
    """A run with parts in parts, dataclasses and lists."""
    sampling = {"max_new_tokens": 4}
    chosen = part("BestOfN", curator=part("TeacherCurator", sampling=sampling), verifier=part("Distinct"), n=2)
    rejected = part("StudentCurator", sampling=sampling, rounds={"every": 2})
    settings = {
        "trainer": QUIET | {"default_root_dir": str(folder / run), "max_epochs": 1} | trainer,
        "model": {
            "student": {"source": str(folder / "student"), "lora": {"r": 2}},
            "teacher": part("TransformersTeacher", source=str(folder / "teacher"), dtype="float32"),
            "loss": part("DistiLLM2", alpha=part("AdaptiveAlpha", warmup_steps=5)),
            "curator": part(
                "FilteredCurator",
                curator=part("PairedCurator", chosen=chosen, rejected=rejected),
                filters=["Empty", part("Repeated", ngram=2)],
            ),
            "optimizer": part("torch.optim.AdamW", lr=1e-3),
            "lr_schedule": part("torch.optim.lr_scheduler.StepLR", step_size=3),
            "answers": {"temperature": 0.0, "max_new_tokens": 4},
            "slicing": {"compile": False},
            "metrics": {"d2": part("Distinct", n=2)},
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "val": part("distillkit.data.records.Source", path=str(folder / "val.jsonl"), limit=2),
            "batch_size": 2,
            "decontaminate": {"against": [str(folder / "val.jsonl")], "ngram": 50},
        },
    }
    return write_config(folder / f"{run}.yaml", settings)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The folder of a finished run of the command, with the loggers that it has by default."""
    callbacks = [{"class_path": "RunCheckpoint"}]
    assert command(["fit", "--config", config(folder, "run", callbacks=callbacks)]) == 0
    return folder / "run"


def simplified(value: Any) -> Any:
    """Settings without the packages of the classes, and dataclasses as mappings of their fields.

    Seeds are left out: where none is set, the run's is logged.
    """
    if isinstance(value, list):
        return [simplified(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: simplified(item) for key, item in value.items() if key != "seed"}
    name, settings = value["class_path"].rpartition(".")[2], simplified(value.get("init_args", {}))
    return settings if name in ("Sampling", "Lora", "Slicing", "Decontamination") else [name, settings]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers_get_the_resolved_configuration(run: Path, logger: str) -> None:
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    logged = yaml.safe_load((run / logger / "version_0" / "hparams.yaml").read_text())
    assert simplified(logged) == simplified(resolved["model"] | resolved["data"])
    assert logged["curator"]["init_args"]["filters"][1]["init_args"] == {"ngram": 2, "share": 0.5, "window": 64}


def test_a_checkpoint_has_the_settings_as_plain_data(run: Path) -> None:
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert simplified(checkpoint["hyper_parameters"]) == simplified(resolved["model"])
    assert simplified(checkpoint["datamodule_hyper_parameters"]) == simplified(resolved["data"])


def test_tensorboard_lists_the_settings_beside_the_metrics(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard" / "version_0"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optimizer/init_args/lr"].number_value == 1e-3
    assert settings["loss/class_path"].string_value == "distillkit.losses.DistiLLM2"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert {info.name.tag for info in experiment.metric_infos} <= {*events.Tags()["scalars"]}
    assert "hp_metric" not in events.Tags()["scalars"]


def test_a_command_that_resumes_is_not_overridden_by_the_checkpoint(run: Path, folder: Path) -> None:
    arguments = ["--model.optimizer.init_args.lr=0.5", "--data.batch_size=1", "--trainer.max_epochs=2"]
    path = str(run / "checkpoints" / "last.ckpt")
    again = config(folder, "resumed")
    assert command(["fit", "--config", again, *arguments, "--ckpt_path", path]) == 0
    resolved = yaml.safe_load((folder / "resumed" / "config.yaml").read_text())
    assert resolved["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert resolved["data"]["batch_size"] == 1


def test_a_module_of_the_command_is_made_again_in_python(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    module, data = DistillModule.load_from_checkpoint(path), DistillData.load_from_checkpoint(path)
    assert module.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 1e-3
    last = module.history[-1]
    options = QUIET | {"default_root_dir": tmp_path, "logger": False, "enable_checkpointing": False}
    (metrics,) = lightning.Trainer(**options).validate(module, data, verbose=False)
    assert metrics == pytest.approx(last, rel=1e-5)


def in_python(folder: Path, root: Path, *loggers: Any) -> DistillModule:
    """A run from Python."""
    module = DistillModule(
        Student(str(folder / "student"), lora=Lora(r=2)),
        SkewKL(0.2),
        TransformersTeacher(str(folder / "teacher"), dtype="float32"),
        DatasetCurator(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        answers=Sampling(temperature=0.0, max_new_tokens=4),
    )
    options = QUIET | {"default_root_dir": root, "max_steps": 1, "enable_checkpointing": False}
    lightning.Trainer(**options, logger=list(loggers)).fit(module, DistillData(str(folder / "train.jsonl")))
    return module


def assert_recorded(settings: Any) -> None:
    assert settings["loss"]["init_args"]["alpha"] == 0.2
    assert settings["loss"]["init_args"]["temperature"] == 1.0
    assert settings["optimizer"]["class_path"] == "torch.optim.SGD"
    assert (settings["optimizer"]["init_args"]["lr"], settings["optimizer"]["init_args"]["momentum"]) == (0.5, 0)
    assert settings["student"]["init_args"]["lora"]["init_args"]["r"] == 2
    assert settings["lr_schedule"] == "(not recorded) builtins.function"
    assert settings["curator"]["class_path"] == "distillkit.curators.DatasetCurator"
    assert settings["batch_size"] == 8


def test_loggers_of_a_run_from_python_get_the_settings_of_its_objects(folder: Path, tmp_path: Path) -> None:
    table, board = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board", default_hp_metric=False)
    module = in_python(folder, tmp_path, table, board)
    for logger in (table, board):
        assert_recorded(yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text()))
    assert set(module.hparams).isdisjoint(DistillData("x.jsonl").hparams), "Lightning refuses a name with two values"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, without its output on the terminal."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    return pytest.importorskip("wandb")


def test_weights_and_biases_get_the_settings(folder: Path, tmp_path: Path, wandb: Any) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    in_python(folder, tmp_path, logger)
    assert_recorded(logger.experiment.config)
    assert b"distillkit.losses.SkewKL" in log_of(wandb, tmp_path)


def log_of(wandb: Any, folder: Path) -> bytes:
    """The file that `wandb sync` uploads; closes the run."""
    wandb.run.finish()
    wandb.teardown()  # waits for the process that writes it
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return log.read_bytes()


def test_the_command_logs_to_weights_and_biases(folder: Path, tmp_path: Path, wandb: Any) -> None:
    logger = part("lightning.pytorch.loggers.WandbLogger", save_dir=str(tmp_path), offline=True)
    assert main(["fit", "--config", config(folder, "wandb", logger=logger, max_steps=1)]) == 0
    assert wandb.run.config["loss"]["class_path"] == "distillkit.losses.DistiLLM2"
    log = log_of(wandb, tmp_path)
    assert b"distillkit.losses.DistiLLM2" in log
    assert b"val/kl" in log

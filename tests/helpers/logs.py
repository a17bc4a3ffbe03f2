"""The names of all metrics that a run logs, read from runs of one step on tiny models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import Callback, Trainer

from distillkit import DistillData, DistillModule
from distillkit.callbacks import Budget, Throughput
from distillkit.config import load
from helpers.docs import ROOT
from helpers.public import objects
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml"))
WITHOUT_TEACHER = ("sft",)


def metric_lines(folder: Path) -> list[str]:
    """The metrics of every method, and those that callbacks and settings add, as `name: methods`.

    Args:
        folder: Folder for the models, the prompts and the runs.
    """
    models = save_models(folder)
    prompts = write_prompts(folder / "prompts.jsonl", 2, response=True)
    objects()  # imports every class, so that a configuration may say its short name
    parser = ArgumentParser()
    parser.add_class_arguments(DistillModule, "model")

    def names(method: str, callbacks: Sequence[Callback] = (), **settings: object) -> set[str]:
        config = load(ROOT / "configs" / "methods" / f"{method}.yaml")["model"]
        model = config | _models(*models, method) | settings
        module = parser.instantiate(parser.parse_object({"model": model})).model
        return _fit(module, prompts, folder / method, callbacks)

    logged = {method: names(method) for method in METHODS}
    common = set.intersection(*logged.values())
    extra = {
        "callback Budget": names("sft", [Budget(tokens=10**9)]) - logged["sft"],
        "callback Throughput": names("sft", [Throughput()]) - logged["sft"],
        "model.overlap": names("imitkd", overlap=True) - logged["imitkd"],
    }
    sources: dict[str, list[str]] = {}
    for source, metrics in (logged | extra).items():
        for name in metrics:
            sources.setdefault(name, []).append(source)
    return sorted(f"{name}: {'every method' if name in common else ', '.join(sources[name])}" for name in sources)


def _models(teacher: str, student: str, method: str) -> dict[str, Any]:
    config: dict[str, Any] = {"student": {"source": student}}
    if method not in WITHOUT_TEACHER:
        settings = {"source": teacher, "dtype": "float32"}
        config["teacher"] = {"class_path": "TransformersTeacher", "init_args": settings}
    return config


def _fit(module: DistillModule, prompts: str, folder: Path, callbacks: Sequence[Callback]) -> set[str]:
    logger = MemoryLogger()
    trainer = Trainer(
        max_steps=1,
        logger=logger,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.fit(module, DistillData(train=prompts, val=prompts, batch_size=2))
    return {name for _, metrics in logger.rows for name in metrics} - {"epoch"}  # Lightning's own

"""The settings and the data of a run, saved in its checkpoints: what differs at a resume is said, or refused."""

import hashlib
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning import Trainer

from distillkit.devices.distributed import rank
from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError
from distillkit.models.sources import identity
from distillkit.training.place import Place
from distillkit.training.run_module import RunModule
from distillkit.types import Prompts

_log = logging.getLogger(__name__)

_NO_EFFECT = (
    "data.train",  # its content counts, below
    "data.batch_size",  # as part of a step
    "data.eval_batch_size",
    "data.seed",
    "data.shuffle",
    "data.layout",
    "data.bucket",
    "model.store",
    "model.export",
    "model.slicing",
    "model.optimizer",  # see `optimizer_state`
    "model.student.compile",
    "model.student.gradient_checkpointing",
    "model.student.attn_implementation",
    "model.teacher.compile",
    "model.generator.batch_size",
    "model.generator.progress",
)
"""Settings without a bearing on the result, beyond rounding, and those that are compared elsewhere."""


@runtime_checkable
class OrderedData(Protocol):
    """A data module that trains on its prompts in an order that is known beforehand."""

    prompts: Mapping[str, Prompts]
    batch_size: int
    shuffle: bool
    seed: int


def run_identity(module: RunModule, trainer: Trainer) -> dict[str, Any]:
    """Settings, data and models of a run as plain data, which a resumed run is compared with.

    Args:
        module: The module, with a trainer.
        trainer: The trainer.

    Returns:
        `settings` by the names that users write, `order`, of which the place within an epoch depends, and
        `batch_prompts`, the prompts of a micro-batch of all devices.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it through a connector
    student = module.student_spec
    algorithm = trainer.gradient_clip_algorithm
    settings = dict(_flat("model", module.hparams))
    settings |= {
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": algorithm.value if algorithm is not None else "norm",
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.max_steps": trainer.max_steps,
        "seed_everything": resolve_seed(None),
        "weights of the teacher": None if module.teacher is None else module.teacher.identity(),
        "weights under the adapters": None if student.lora is None else identity(student.source),
    }
    order: dict[str, Any] = {}
    batch_prompts = 0
    if isinstance(datamodule, OrderedData):
        settings |= dict(_flat("data", datamodule.hparams))  # type: ignore[attr-defined]
        batch_prompts = datamodule.batch_size * trainer.world_size
        order = {
            "the training data": _digest(datamodule.prompts["train"]),
            "data.shuffle": datamodule.shuffle,
            "data.seed": datamodule.seed,
            "trainer.limit_train_batches": trainer.limit_train_batches,
            "data.batch_size × devices × trainer.accumulate_grad_batches": batch_prompts
            * trainer.accumulate_grad_batches,
        }
    relevant = {name: value for name, value in settings.items() if not name.startswith(_NO_EFFECT)}
    return {"settings": relevant, "order": order, "batch_prompts": batch_prompts}


def resumed_place(saved: Mapping[str, Any], now: Mapping[str, Any], restarted: Sequence[str], step: int) -> Place:
    """Compares a run with the one that it resumes, and returns the place at which it goes on.

    Args:
        saved: The saved `run_identity`, with the `place`.
        now: Its `run_identity`.
        restarted: Names of states that the checkpoint lacks, or that no part has any more.
        step: Optimizer steps that were taken.

    Raises:
        ConfigError: If the rest of an epoch would be made of other prompts, or the run has fewer epochs or steps than
            were trained.
    """
    if "place" not in saved:
        raise ConfigError("The checkpoint is from an earlier version of distillkit, and only measures or exports.")
    position = Place(**saved["place"])
    for name, was, new in _differences(saved["order"], now["order"]):
        if position.batches:
            raise ConfigError(
                f"The checkpoint is from within epoch {position.epoch}, and {name} was {was} and is {new}: prompts "
                "would be trained on twice, and others never. Set it as it was, or resume from the end of an epoch."
            )
        _warn(f"Resumed with another value of {name}: it was {was} and is {new}, from this epoch on.")
    for name, was, new in _differences(saved["settings"], now["settings"]):
        if name.startswith("model.lr_schedule."):
            raise ConfigError(
                f"{name} was {was} and is {new}, but the state of a scheduler in a checkpoint includes its settings. "
                "Set it as it was, or begin a new run with this one's student: model.student.source."
            )
        _warn(f"Resumed with another value of {name}: it was {was} and is {new}, from step {step} on.")
    if restarted:
        _warn(f"The loss or the curator is another one, so these begin anew: {', '.join(restarted)}.")
    max_epochs = now["settings"]["trainer.max_epochs"]
    is_within = position.batches > 0
    if max_epochs is not None and 0 <= max_epochs < position.epoch + is_within:
        origin = f"{'within' if is_within else 'from'} epoch {position.epoch}"
        raise ConfigError(
            f"The checkpoint is {origin}, and trainer.max_epochs is {max_epochs}: there is nothing to train. Set "
            f"it above {position.epoch}."
        )
    max_steps = now["settings"]["trainer.max_steps"]
    if 0 <= max_steps < step:
        raise ConfigError(
            f"The checkpoint is from step {step}, and trainer.max_steps is {max_steps}: there is nothing to train. "
            f"Set it above {step}."
        )
    if position.batches and now["batch_prompts"] != saved["batch_prompts"]:  # in as large steps, as was checked above
        before = position.batches
        batches = before * saved["batch_prompts"] // now["batch_prompts"]
        position = Place(position.epoch, batches, position.total_batches - before + batches, position.validated)
    return position


def _warn(message: str) -> None:
    if rank() == 0:
        _log.warning(message)


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Names with two values. Where a part is another one, its settings are not compared."""
    changed: list[str] = []
    for name in sorted(saved.keys() | now.keys()):
        was, new = saved.get(name, "not set"), now.get(name, "not set")
        if was != new and not name.startswith(tuple(f"{part}." for part in changed)):
            changed.append(name)
            yield name, was, new


def _flat(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names; the value of a part is its class."""
    if not isinstance(value, Mapping):
        yield name, value
    elif "class_path" in value:
        yield name, value["class_path"].rpartition(".")[2]
        yield from _flat(name, value.get("init_args", {}))
    else:
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)


def _digest(prompts: Prompts) -> str:
    """Number of prompts, and a hash of their tokens in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", (len(prompt.input_ids), *prompt.input_ids, *prompt.reference_ids)).tobytes())
    return f"{len(prompts)} prompts with hash {digest.hexdigest()[:8]}"

"""A LightningModule that outlives its run: it can be cast, copied, pickled, sent between processes and fitted again."""

import copy
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from lightning import LightningModule, Trainer
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE
from torch import Tensor

from distillkit.config.hyperparameters import construct
from distillkit.errors import ConfigError
from distillkit.interfaces import Teacher
from distillkit.models.student import Student
from distillkit.training.checkpoint import Checkpoint
from distillkit.training.place import current_place
from distillkit.training.validation import Validation

_OF_A_RUN = ("writers", "rounds", "identity")
"""Cached properties that belong to one trainer: they hold its folder, its ranks and its threads."""


class PortableModule(LightningModule):
    """Base of a module whose student is loaded when a run starts, and whose parts may have state.

    Subclasses set the attributes below, call `remember_parts` at the end of their constructor, and `begin_run` when
    Lightning attaches a trainer.
    """

    student: Any
    """The model that is trained; None until it is loaded."""
    student_spec: Student
    """Loads the student."""
    teacher: Teacher | None
    validation: Validation

    def __init__(self) -> None:
        super().__init__()
        self.optimizer_settings: dict[str, Any] = {}  # of the run's optimizer as it was made
        self._run: weakref.ref[Trainer] | None = None
        self._initial: dict[str, dict[str, Any]] = {}

    @property
    def completed_epochs(self) -> int:
        """Number of epochs that were trained to their end."""
        return current_place(self.trainer, validated=True).epoch

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes the module of a run again, with the student's weights and the state of all parts.

        The parts are made from the settings that the checkpoint records. The teacher is loaded once it is needed.

        Args:
            checkpoint_path: The checkpoint.
            map_location: Device of the module, or how `torch.load` maps devices; None is the CPU.
            hparams_file: Not supported: pass settings by name.
            strict: Whether a state that is missing, or belongs to no part, is an error; None is True.
            weights_only: As in `torch.load`; None is True: no code in the file is run.
            kwargs: Arguments of the constructor that replace the recorded ones, such as a student that has moved.

        Raises:
            ConfigError: If there is no such file, or `hparams_file` is set.
            ModelError: If it is damaged, or a part or the student can't be made again.
        """
        if hparams_file is not None:
            raise ConfigError("hparams_file is not supported: pass the settings by name, such as student=Student(...).")
        checkpoint = Checkpoint.read(checkpoint_path, map_location, weights_only)
        module: Self = construct(cls, checkpoint.settings(cls.CHECKPOINT_HYPER_PARAMS_KEY, kwargs))
        module.student = checkpoint.load_student(module.student_spec)
        checkpoint.restore(module, strict is not False)
        module.validation.resume(checkpoint.content["distillkit"]["history"], checkpoint.content["global_step"])
        return module.to(checkpoint.device)

    def remember_parts(self) -> None:
        """Notes the state of all parts, which `begin_run` restores for another run."""
        parts = {name: part.state_dict() for name, part in self.named_children() if name != "student"}
        self._initial = copy.deepcopy(parts)

    def begin_run(self, trainer: Trainer) -> bool:
        """Makes a run independent of the runs before, under other trainers, except for the student's weights.

        Args:
            trainer: The trainer of the run.

        Returns:
            True if this trainer has not run the module before and is about to train it.
        """
        if self._run is not None and self._run() is trainer:
            return False
        self._run, self.optimizer_settings = weakref.ref(trainer), {}
        for name in _OF_A_RUN:
            self.__dict__.pop(name, None)
        # In inference mode torch makes tensors that training can't change, such as a model's cached frequencies.
        trainer.validate_loop.inference_mode = trainer.test_loop.inference_mode = False
        if trainer.state.fn != "fit":
            return False
        for name, part in self.named_children():
            if name in self._initial:
                part.load_state_dict(copy.deepcopy(self._initial[name]))
        return True

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state, and the student before it if it was trained in another process (`ddp_spawn`)."""
        if self.student is None and any(name.startswith("student.") for name in state_dict):
            self.student = self.student_spec.load()
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A run in half precision casts the whole module. Buffers keep their type: those of schedules are sums over the
        # run, and a model's rotary frequencies in half precision are those of other positions.
        buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, original in buffers:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != original.dtype:
                module._buffers[name] = original.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in _OF_A_RUN} | {"_run": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self._trainer is not None and self.student is None:
            raise ConfigError(
                f"A callback copies {type(self).__name__} before its student exists, and would work on a copy without "
                "weights. Copy it in on_fit_start or later."
            )
        if self.teacher is not None:  # frozen, and often larger than all the rest
            memo[id(self.teacher)] = self.teacher
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return duplicate

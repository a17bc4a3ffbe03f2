"""Checkpoints read without a trainer: the settings and the weights of a run."""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn

from distillkit.config.hyperparameters import build
from distillkit.errors import ConfigError, DistillKitError, ModelError
from distillkit.models.student import Student
from distillkit.run_folder import CHECKPOINTS, LAST_CHECKPOINT
from distillkit.storage.checkpoint_files import damage
from distillkit.training.resume import require_trained

STUDENT = "student."
"""Prefix of the student's weights in a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Args:
        name: Name of the file, for messages.
        content: What the trainer saved.
    """

    name: str
    content: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        path: str | Path | IO[bytes],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> "Checkpoint":
        """Reads a checkpoint.

        Args:
            path: The file, or its opened content.
            map_location: Where its tensors are put, as in `torch.load`; None is the CPU.
            weights_only: As in `torch.load`; None is True: no code in the file is run.

        Raises:
            ConfigError: If there is no such file.
            ModelError: If it is damaged, or was not written by a run of this package.
        """
        is_path = isinstance(path, str | Path)
        if isinstance(path, str | Path):
            _require_file(Path(path))
        try:
            content = torch.load(
                path,
                map_location="cpu" if map_location is None else map_location,
                weights_only=weights_only is not False,
                mmap=is_path,  # the optimizer's state is not needed, and stays on the disk
            )
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror or error}.") from error
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ModelError(
                f"{path} is not a checkpoint, is damaged, or contains more than tensors and plain data."
            ) from error
        if not isinstance(content, dict) or not {"distillkit", "state_dict"} <= content.keys():
            raise ModelError(f"{path} was not written by a run of distillkit. Name a file in {CHECKPOINTS} of a run.")
        return cls(str(path), content)

    def settings(self, key: str, replacements: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments of the run's module or data module.

        Args:
            key: Lightning's key of the object's hyperparameters.
            replacements: Arguments by name that are used instead of the recorded ones.

        Raises:
            ModelError: If one can't be made again.
        """
        names = self.content.get(key, {}).keys() - replacements.keys()
        return {name: self.setting(key, name) for name in names} | dict(replacements)

    def setting(self, key: str, name: str) -> Any:
        """One of the arguments in `settings`.

        Args:
            key: Lightning's key of the object's hyperparameters.
            name: Name of the argument.

        Raises:
            ModelError: If it can't be made again.
        """
        recorded = self.content.get(key, {})
        if name not in recorded:
            raise ModelError(f"{self.name} does not record the run's {name}. Pass it: {name}=...")
        try:
            return build(recorded[name])
        except DistillKitError as error:
            message = f"{self.name}: the run's {name} can't be made again. {error} Pass another one: {name}=..."
            if name in _FACTORIES:
                return _Missing(message)
            raise ModelError(message) from error

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        weights = self.content["state_dict"].values()
        return next((value.device for value in weights if isinstance(value, Tensor)), torch.device("cpu"))

    def load_student(self, student: Student) -> nn.Module:
        """Loads the student's model with the weights of the checkpoint onto the CPU.

        Args:
            student: The student's settings.

        Raises:
            ModelError: If the model's source is missing, or is not that of the run.
        """
        try:
            model = student.load()
        except DistillKitError as error:
            raise ModelError(
                f"{self.name}: the run's student can't be loaded. {error} If it moved, pass student=Student(...); a "
                "relative path starts at the current folder."
            ) from error
        state = self.content["state_dict"]
        require_trained(state, model, STUDENT)
        weights = {name.removeprefix(STUDENT): value for name, value in state.items() if name.startswith(STUDENT)}
        frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
        self._load(model, weights, frozen)
        return model

    def restore(self, module: nn.Module, strict: bool = True) -> None:
        """Loads the state of all parts but the student.

        Args:
            module: The module that was made from `settings`.
            strict: Whether a state that is missing, or belongs to no part, is an error.

        Raises:
            ModelError: If the state is not that of these parts.
        """
        states = {name: value for name, value in self.content["state_dict"].items() if not name.startswith(STUDENT)}
        self._load(module, states, (name for name in module.state_dict() if name.startswith(STUDENT)), strict)

    def _load(self, module: nn.Module, state: Mapping[str, Any], optional: Iterable[str], strict: bool = True) -> None:
        try:
            result = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{self.name} does not fit {type(module).__name__}. torch says: {reason}") from error
        misfits = sorted({*result.missing_keys} - {*optional}) + result.unexpected_keys
        if misfits and strict:
            raise ModelError(
                f"{self.name} does not fit {type(module).__name__}: {len(misfits)} weights or states are missing or "
                f"belong to no part, such as {misfits[0]}. Use the settings of the run that wrote it."
            )


_FACTORIES = ("optimizer", "lr_schedule")


class _Missing:
    """A factory that only training needs, and that the checkpoint does not record.

    Args:
        message: The error of its call.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, *_: object) -> NoReturn:
        raise ConfigError(self.message)


def _require_file(path: Path) -> None:
    if path.is_dir():
        last = path / CHECKPOINTS / LAST_CHECKPOINT
        raise ConfigError(f"{path} is a folder. Name a checkpoint in it{f', such as {last}' if last.exists() else ''}.")
    if not path.is_file():
        raise ConfigError(f"There is no checkpoint {path}. Check the path: a run saves them in {CHECKPOINTS}.")
    reason = damage(path)
    if reason:
        raise ModelError(f"{path} is damaged ({reason}): name another checkpoint, or restore this one.")

"""The interface through which the state of a run is saved, restored and compared."""

from typing import Any, Protocol

import torch
from lightning import Trainer

from distillkit.interfaces import Teacher
from distillkit.models.student import Student
from distillkit.rollouts.rounds import RoundRunner
from distillkit.training.resume import StepRandom
from distillkit.training.validation import Validation


class RunModule(Protocol):
    """The training module as checkpoints see it."""

    student: Any
    student_spec: Student
    teacher: Teacher | None
    validation: Validation
    resumed: dict[str, Any]
    step_random: StepRandom
    history: list[dict[str, float]]
    strict_loading: Any

    @property
    def hparams(self) -> Any:
        """The settings, as plain data."""

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, data and models of the run, which a resumed run is compared with."""

    @property
    def rounds(self) -> RoundRunner:
        """The rounds of the run."""

    @property
    def trainer(self) -> Trainer:
        """The trainer."""

    @property
    def device(self) -> torch.device:
        """The device of the student."""

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts."""

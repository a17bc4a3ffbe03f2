"""The interface through which callbacks use the module that is trained."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distillkit.evaluation.heldout import HeldOut
from distillkit.interfaces import Curator, Loss, Schedule, Teacher
from distillkit.models.student import Student
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.rounds import RoundRunner


class RunModule(Protocol):
    """The training module as callbacks see it: a `DistillModule`."""

    student: Any
    student_spec: Student
    teacher: Teacher | None
    loss: Loss
    curator: Curator
    held_out: HeldOut
    history: list[dict[str, float]]
    hparams: Any
    log: Callable[..., None]
    log_dict: Callable[..., None]

    @property
    def device(self) -> torch.device:
        """The device of the student."""

    @property
    def completed_epochs(self) -> int:
        """Number of epochs that were trained to their end."""

    @property
    def same_vocab_teacher(self) -> Teacher | None:
        """The teacher, if it uses the student's tokenizer."""

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules that are logged, by name."""

    @property
    def writers(self) -> GeneratorPool:
        """The generators of the run, behind its response store."""

    @property
    def rounds(self) -> RoundRunner:
        """The rounds of the run."""

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the 2-norm of the gradient of this step, `[]`, before clipping."""

    def use_progress(self, progress_fn: Callable[[int], float]) -> None:
        """Lets a function decide how far the run is."""

"""Contract tests that every part of a kind must pass, for the built-in parts and for a plugin's alike.

Nothing here needs pytest: each `check_…` raises an AssertionError that names the broken promise. Each `…Contract` class
holds the same promises as test methods.
"""

from distillkit.testing.batches import make_batch, make_rows
from distillkit.testing.curators import CuratorContract, SeededGenerator, check_curator, make_prompts
from distillkit.testing.generators import GeneratorContract, check_generator
from distillkit.testing.losses import LossContract, TokenLossContract, check_loss
from distillkit.testing.schedules import ScheduleContract, check_schedule
from distillkit.testing.teachers import BigramTeacher, TeacherContract, check_teacher
from distillkit.testing.verifiers import VerifierContract, check_verifier

__all__ = [
    "BigramTeacher",
    "CuratorContract",
    "GeneratorContract",
    "LossContract",
    "ScheduleContract",
    "SeededGenerator",
    "TeacherContract",
    "TokenLossContract",
    "VerifierContract",
    "check_curator",
    "check_generator",
    "check_loss",
    "check_schedule",
    "check_teacher",
    "check_verifier",
    "make_batch",
    "make_prompts",
    "make_rows",
]

"""Contract tests that every part of a kind must pass, for the built-in parts and for a plugin's alike.

Nothing here needs pytest: each `check_…` raises an AssertionError that names the broken promise. Each `…Contract` class
holds the same promises as test methods.
"""

from distillkit.testing.batches import make_batch, make_rows
from distillkit.testing.curators import CuratorContract, SeededGenerator, check_curator, make_prompts
from distillkit.testing.losses import LossContract, TokenLossContract, check_loss
from distillkit.testing.schedules import ScheduleContract, check_schedule

__all__ = [
    "CuratorContract",
    "LossContract",
    "ScheduleContract",
    "SeededGenerator",
    "TokenLossContract",
    "check_curator",
    "check_loss",
    "check_schedule",
    "make_batch",
    "make_prompts",
    "make_rows",
]

"""Callbacks: checkpoints, budgets, throughput, answers side by side, and the exported model."""

from distillkit.callbacks.answers import Answers
from distillkit.callbacks.budget import Budget
from distillkit.callbacks.checkpoint import RunCheckpoint
from distillkit.callbacks.export import Export
from distillkit.callbacks.finite import FiniteLoss
from distillkit.callbacks.throughput import Throughput

__all__ = ["Answers", "Budget", "Export", "FiniteLoss", "RunCheckpoint", "Throughput"]

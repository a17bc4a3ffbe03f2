"""Callbacks: checkpoints, throughput, answers side by side, and the exported model."""

from distillkit.callbacks.answers import Answers
from distillkit.callbacks.checkpoint import RunCheckpoint
from distillkit.callbacks.export import Export
from distillkit.callbacks.throughput import Throughput

__all__ = ["Answers", "Export", "RunCheckpoint", "Throughput"]

"""The held-out prompts of a run: their references, and the figures of each time the student was measured on them."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule

from distillkit.evaluation.heldout import HeldOut
from distillkit.interfaces import Generator
from distillkit.types import Prompts, Row, Sampling, Summary


class Validation:
    """Measures the student again and again on the same prompts.

    Args:
        metrics: Counts the batches of references that the student scores.
        sampling: How the student's answers are drawn.
    """

    def __init__(self, metrics: HeldOut, sampling: Sampling) -> None:
        self.metrics, self.sampling = metrics, sampling
        self.history: list[dict[str, float]] = []
        self._prompts = Prompts(())
        self._references: list[str] = []
        self._loaded_step = 0

    def refer_to(self, prompts: Prompts, rows: Sequence[Row], tokenizer: Any) -> None:
        """Takes the prompts and a row with the reference response to each."""
        responses = [[i for i, used in zip(row.input_ids, row.response_mask, strict=True) if used] for row in rows]
        self._prompts = prompts
        self._references = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in responses]

    def resume(self, history: list[dict[str, float]], step: int) -> None:
        """Takes up the figures of a run that had taken `step` optimizer steps."""
        self.history[:] = history
        self._loaded_step = step

    def finish(self, module: LightningModule, student: Generator, prefix: str) -> dict[str, Summary]:
        """Has the student answer, and logs the figures; those before training only if they are new and of all prompts.

        Args:
            module: Logs them.
            student: Continues prompts with the student's weights.
            prefix: Put before each figure's name.

        Returns:
            The figures, for schedules; none if they are not new.
        """
        trainer = module.trainer
        if trainer.sanity_checking and (trainer.num_sanity_val_steps != float("inf") or self.history):
            self.metrics.reset()
            return {}
        step = trainer.global_step or self._loaded_step  # Lightning restores the step for `fit` only
        own = slice(trainer.global_rank, None, trainer.world_size)
        self.metrics.answer(student, self._prompts[own], self._references[own], self.sampling)
        found = {prefix + name: value for name, value in self.metrics.compute().items()}
        figures = {name: float(value) for name, value in found.items()}
        self.history.append({"step": step} | figures)
        if trainer.sanity_checking:
            for logger in trainer.loggers:  # log_dict does nothing before training
                logger.log_metrics(figures, step=step)
        else:  # a figure named `step` is the step that Lightning logs the others at, which it would take for 0
            module.log_dict(figures if trainer.state.fn == "fit" else figures | {"step": float(step)})
        return {name: Summary(value, value, value, torch.ones_like(value)) for name, value in found.items()}

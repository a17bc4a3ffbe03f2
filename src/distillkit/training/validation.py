"""Validation of a run: the held-out prompts, their references, and the metrics of every validation so far."""

from collections.abc import Sequence

import torch
from lightning import LightningModule

from distillkit.evaluation.heldout import HeldOut
from distillkit.generators.texts import decoded
from distillkit.interfaces import Generator
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Row, Sampling, Summary, Tokenizer


def gold_rows(prompt: Prompt) -> list[Row]:
    """The row with the data's own answer to a held-out prompt, of which the last turn counts; empty if it has none.

    Args:
        prompt: The prompt.
    """
    if prompt.reference is None or not prompt.reference_ids:
        return []
    start = len(prompt.input_ids)
    mask = (False,) * start + prompt.reference_mask[start:]
    return [Row(prompt.reference_ids, mask, "dataset", prompt.id)]


class Validation:
    """Evaluates the student repeatedly on the same prompts.

    Args:
        metrics: Accumulates the student's scores of the reference batches.
        sampling: Sampling of the student's answers.
    """

    def __init__(self, metrics: HeldOut, sampling: Sampling) -> None:
        self.metrics, self.sampling = metrics, sampling
        self.history: list[dict[str, float]] = []
        self._prompts = Prompts(())
        self._references: list[str] = []
        self.trained_steps = 0  # optimizer steps that the weights have had, outside of training

    def set_references(self, prompts: Prompts, rows: Sequence[Row], tokenizer: Tokenizer) -> None:
        """Sets the prompts, and for each the row with its reference response.

        Earlier answers of a conversation, on which a row of the data is trained too, are part of the prompt.
        """
        end_ids = eos_ids(tokenizer, None)
        self._prompts = prompts
        self.metrics.expect_gold(any(row.writer != "dataset" for row in rows) and any(map(gold_rows, prompts)))
        self._references = [
            decoded(tokenizer, row.input_ids[len(prompt.input_ids) :], end_ids, prompt)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def resume(self, history: list[dict[str, float]], step: int) -> None:
        """Restores the history of a run that had taken `step` optimizer steps."""
        self.history[:] = history
        self.trained_steps = step

    def start_over(self) -> None:
        """Forgets the history, for another run."""
        self.history.clear()
        self.trained_steps = 0

    def finish(self, module: LightningModule, student: Generator, prefix: str) -> dict[str, Summary]:
        """Generates the student's answers and logs the metrics.

        Before training they are logged only if they are new and cover all prompts.

        Args:
            module: The module whose loggers are used.
            student: Generates with the student's weights.
            prefix: Prefix of each metric's name.

        Returns:
            The metrics, for schedules; empty if they are not new.
        """
        trainer = module.trainer
        if trainer.sanity_checking and (trainer.num_sanity_val_steps != float("inf") or self.history):
            self.metrics.reset()
            return {}
        step = trainer.global_step if trainer.state.fn == "fit" else self.trained_steps
        rank_part = slice(trainer.global_rank, None, trainer.world_size)
        self.metrics.answer(student, self._prompts[rank_part], self._references[rank_part], self.sampling)
        results = {prefix + name: value.to(module.device) for name, value in self.metrics.compute().items()}
        values = {name: float(value) for name, value in results.items()}
        self.history.append({"step": step} | values)
        if trainer.sanity_checking:
            for logger in trainer.loggers:  # log_dict does nothing before training
                logger.log_metrics(values, step=step)
        else:  # Lightning logs the metrics at the value of `step`; outside `fit` it would take 0
            module.log_dict(values if trainer.state.fn == "fit" else values | {"step": float(step)})
            if "val/kl" in values and trainer.state.fn == "fit":  # under a short name for the progress bar
                module.log("kl", values["val/kl"], prog_bar=True, logger=False)
        return {name: Summary(value, value, value, torch.ones_like(value)) for name, value in results.items()}

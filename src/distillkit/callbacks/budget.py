"""What a run costs, and the end of one that may cost only so much."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from distillkit.errors import ConfigError
from distillkit.evaluation.flops import ModelFlops, model_flops
from distillkit.types import Batch

USAGE = "usage.json"
"""File in the run's folder that says what the run has cost."""


class Budget(Callback):
    """Ends a run after so many tokens, seconds or steps; schedules and learning rate then run to that end.

    Counted are response positions of all ranks, and the seconds of training steps and of waiting for responses, without
    validation. Both are logged (`train/spent_tokens`, `train/spent_seconds`), and what the run has cost is in
    `usage.json` in its folder when it ends. Without a limit it only counts.

    A limit takes the place of `max_epochs`, which is to be -1: epochs follow one another until the budget is spent. The
    end is validated wherever in an epoch it is.

    Args:
        tokens: Response tokens to train on, above 0; None for no limit. The step that reaches it is the last.
        seconds: Seconds to train for, above 0; None for no limit.
        steps: Optimizer steps, above 0; None for no limit.

    Raises:
        ConfigError: If several limits are given, or one is out of range.
    """

    def __init__(self, tokens: int | None = None, seconds: float | None = None, steps: int | None = None) -> None:
        limits = {"tokens": tokens, "seconds": seconds, "steps": steps}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(given) > 1:
            raise ConfigError(f"Budget takes one limit, got {' and '.join(given)}: leave the others out.")
        for name, limit in given.items():
            if not limit > 0:
                raise ConfigError(f"Budget.{name} must be above 0, got {limit}.")
        self.tokens, self.seconds, self.steps = tokens, seconds, steps
        self.has_limit = bool(given)
        self.spent_tokens, self.step_seconds, self.curation_seconds = 0, 0.0, 0.0
        self.teacher_tokens = 0
        self._before: dict[str, Any] = {"seconds": 0.0, "written": Counter()}  # until the checkpoint
        self._teacher: ModelFlops | None = None
        self._start = 0.0
        self._seen: dict[str, set[bytes]] = {}
        self._distinct: Counter[str] = Counter()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Makes the run last as long as the budget."""
        if stage != "fit" or not self.has_limit:
            return
        if trainer.max_epochs != -1:
            raise ConfigError(
                f"A Budget ends the run, and so does trainer.max_epochs: {trainer.max_epochs}: set that to -1."
            )
        pl_module.share_done = self._share

    def _share(self, step: int) -> float:
        """The share of the budget that is spent after `step` steps, which are those until now."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        if self.tokens is not None:
            return min(self.spent_tokens / self.tokens, 1.0)
        assert self.seconds is not None
        return min((self.step_seconds + self.curation_seconds) / self.seconds, 1.0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Sees whose forward passes count, and whether a run that goes on has anything left to spend."""
        if self.has_limit and self._share(trainer.global_step) >= 1.0:
            trainer.should_stop = True
        teacher = pl_module.teacher if pl_module.loss.needs_teacher else None
        self._teacher = None if teacher is None else model_flops(teacher.scorer, trained=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Counts a micro-batch, before its step moves the schedules."""
        tokens = batch.num_tokens  # known on the host: a single rank must not wait for its device
        if trainer.world_size > 1:
            own = torch.tensor(float(tokens), dtype=torch.float64, device=pl_module.device)
            tokens = int(trainer.strategy.reduce(own, reduce_op="sum"))
        self.spent_tokens += tokens
        self.teacher_tokens += 0 if self._teacher is None else self._teacher.tokens(batch)
        for key, writer, length in zip(batch.keys, batch.writer, batch.lengths, strict=True):
            seen = self._seen.setdefault(writer, set())
            if key not in seen:
                seen.add(key)
                self._distinct[writer] += length
        self.curation_seconds = self._before["seconds"] + pl_module.rounds.seconds
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stops the clock, logs, and ends the run if the budget is spent."""
        if self.seconds is not None and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.step_seconds += time.perf_counter() - self._start
        spent = self.step_seconds + self.curation_seconds
        figures = {"train/spent_tokens": float(self.spent_tokens), "train/spent_seconds": spent}
        pl_module.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()})
        step_is_taken = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self.has_limit and step_is_taken:
            is_spent = self._share(trainer.global_step) >= 1.0
            trainer.should_stop = trainer.should_stop or trainer.strategy.reduce_boolean_decision(is_spent, all=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes down what the run has cost."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / USAGE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.usage(pl_module), indent=2) + "\n")

    def usage(self, module: Any) -> dict[str, Any]:
        """What the run has cost so far; tokens by writer are those of this rank."""
        return {
            "spent_tokens": self.spent_tokens,
            "spent_seconds": self.step_seconds + self.curation_seconds,
            "curation_seconds": self.curation_seconds,
            "teacher_tokens": self.teacher_tokens,
            "distinct_tokens": dict(self._distinct),
            "written_tokens": dict(self._written(module)),
        }

    def _written(self, module: Any) -> Counter[str]:
        """Tokens that were written, until the checkpoint that the run goes on from and since."""
        now = {name: getattr(own, "num_tokens", 0) for name, own in module.writers.generators.items()}
        return Counter(self._before["written"]) + Counter(now)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps what was counted, which `state_dict` could not ask the module for."""
        checkpoint["distillkit_budget"] = {
            "spent_tokens": self.spent_tokens,
            "step_seconds": self.step_seconds,
            "teacher_tokens": self.teacher_tokens,
            "seconds": self._before["seconds"] + pl_module.rounds.seconds,
            "written": dict(self._written(pl_module)),
            "distinct": dict(self._distinct),
            "seen": {writer: b"".join(sorted(keys)) for writer, keys in self._seen.items()},
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Counts on."""
        saved = checkpoint.get("distillkit_budget")
        if saved is None:
            return
        self.spent_tokens, self.step_seconds = saved["spent_tokens"], saved["step_seconds"]
        self.teacher_tokens, self.curation_seconds = saved["teacher_tokens"], saved["seconds"]
        self._before = {"seconds": saved["seconds"], "written": Counter(saved["written"])}
        self._distinct = Counter(saved["distinct"])
        self._seen = {
            writer: {keys[start : start + 16] for start in range(0, len(keys), 16)}
            for writer, keys in saved["seen"].items()
        }

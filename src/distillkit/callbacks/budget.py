"""Budgets: the cost of a run in tokens and seconds, and a limit that ends it."""

import json
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer

from distillkit.callbacks.flops import ModelFlops, model_flops
from distillkit.devices.streams import synchronize
from distillkit.errors import ConfigError, check_range
from distillkit.run_folder import RUN_NAME, USAGE
from distillkit.storage.atomic import write_atomically
from distillkit.types import Batch

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule


@dataclass
class _Resumed:
    """Totals of the checkpoint that a run resumes from; zero for a new run.

    Args:
        seconds: Seconds of waiting for responses.
        run: Name of the run that saved the checkpoint.
        generated: Generated tokens by writer.
    """

    seconds: float = 0.0
    run: str = ""
    generated: Counter[str] = field(default_factory=Counter)


class Budget(Callback):
    """Ends a run after a number of tokens, seconds or steps; schedules and learning rate are scaled to that end.

    It counts the response positions of all ranks, and the seconds of training steps and of waiting for responses,
    without validation. Both are logged (`train/spent_tokens`, `train/spent_seconds`), and the totals are written to
    `usage.json` in the run's folder when it ends. Without a limit it only counts.

    A limit replaces `max_epochs`, which must be -1: epochs are repeated until the budget is spent. The student is
    validated at the end, also in the middle of an epoch.

    Args:
        tokens: Response tokens to train on, above 0; None for no limit. The step that reaches the limit is the last.
        seconds: Seconds to train for, above 0; None for no limit.
        steps: Optimizer steps, above 0; None for no limit.

    Raises:
        ConfigError: If several limits are set, or one is out of range.
    """

    def __init__(self, tokens: int | None = None, seconds: float | None = None, steps: int | None = None) -> None:
        limits = {"tokens": tokens, "seconds": seconds, "steps": steps}
        active = [name for name, limit in limits.items() if limit is not None]
        if len(active) > 1:
            raise ConfigError(f"Budget takes one limit, got {' and '.join(active)}: leave the others out.")
        for name, limit in limits.items():
            check_range(f"Budget.{name}", limit, 0, closed="neither")
        self.tokens, self.seconds, self.steps = tokens, seconds, steps
        self.has_limit = bool(active)
        self.spent_tokens, self.step_seconds, self.curation_seconds = 0, 0.0, 0.0
        self.teacher_tokens = 0
        self._resumed = _Resumed()
        self._teacher: ModelFlops | None = None
        self._start = 0.0
        self._row_keys: dict[str, set[bytes]] = {}
        self._distinct: Counter[str] = Counter()
        self._run = ""

    def setup(self, trainer: Trainer, pl_module: "RunModule", stage: str) -> None:
        """Sets the length of the run to that of the budget."""
        if stage != "fit" or not self.has_limit:
            return
        if trainer.max_epochs != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # as below
            raise ConfigError(
                f"trainer.max_epochs must be -1 with a limit in Budget, which ends the run, got {trainer.max_epochs}."
            )
        for name in ("min_steps", "min_epochs"):  # Lightning sets the second if the first is set
            if getattr(trainer, name):
                raise ConfigError(
                    f"trainer.{name} can't be used with a limit in Budget: training would go on after it. Leave it out."
                )
        pl_module.use_progress(self._fraction_spent)

    def _fraction_spent(self, step: int) -> float:
        """The fraction of the budget that is spent after `step` steps, the current number of steps."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        if self.tokens is not None:
            return min(self.spent_tokens / self.tokens, 1.0)
        assert self.seconds is not None
        return min((self.step_seconds + self.curation_seconds) / self.seconds, 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Lets the response store count what this run generates, which a killed process can't do at its end."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it through a connector
            return
        self._run = trainer.strategy.broadcast(_run_name(trainer))
        pl_module.writers.store.count_for(self._run)

    def on_train_start(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Stops a resumed run that has no budget left, and sets up the count of the teacher's tokens."""
        if self.has_limit and self._fraction_spent(trainer.global_step) >= 1.0:
            trainer.should_stop = True
        teacher = pl_module.teacher if pl_module.loss.needs_teacher else None
        self._teacher = None if teacher is None else model_flops(teacher.scoring_module, trained=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: "RunModule", batch: Batch, batch_idx: int) -> None:
        """Counts a micro-batch, before its step moves the schedules."""
        tokens = batch.num_tokens  # on the host: a single rank must not wait for its device
        if trainer.world_size > 1:
            rank_tokens = torch.full((), float(tokens), dtype=torch.float64, device=pl_module.device)
            tokens = int(trainer.strategy.reduce(rank_tokens, reduce_op="sum"))
        self.spent_tokens += tokens
        self.teacher_tokens += 0 if self._teacher is None else self._teacher.tokens(batch)
        for key, writer, length in zip(batch.keys, batch.writer, batch.lengths, strict=True):
            row_keys = self._row_keys.setdefault(writer, set())
            if key not in row_keys:
                row_keys.add(key)
                self._distinct[writer] += length
        self.curation_seconds = self._resumed.seconds + pl_module.rounds.seconds
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: "RunModule", outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Stops the clock, logs the totals, and ends the run if the budget is spent."""
        if self.seconds is not None:
            synchronize(pl_module.device)
        self.step_seconds += time.perf_counter() - self._start
        spent = self.step_seconds + self.curation_seconds
        totals = {"train/spent_tokens": float(self.spent_tokens), "train/spent_seconds": spent}
        pl_module.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in totals.items()})
        step_is_taken = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self.has_limit and step_is_taken:
            is_spent = self._fraction_spent(trainer.global_step) >= 1.0
            trainer.should_stop = trainer.should_stop or trainer.strategy.reduce_boolean_decision(is_spent, all=False)

    def on_train_end(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Writes `usage.json`, unless it is a run with `fast_dev_run`."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # as above
            path = Path(trainer.default_root_dir) / USAGE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(self.usage(pl_module), indent=2) + "\n")

    def usage(self, module: "RunModule") -> dict[str, object]:
        """The cost of the run so far: `written_tokens` of all ranks, `teacher_` and `distinct_tokens` of this one."""
        return {
            "spent_tokens": self.spent_tokens,
            "spent_seconds": self.step_seconds + self.curation_seconds,
            "curation_seconds": self.curation_seconds,
            "teacher_tokens": self.teacher_tokens,
            "distinct_tokens": dict(self._distinct),
            "written_tokens": dict(self._generated(module)),
        }

    def _generated(self, module: "RunModule") -> Counter[str]:
        """Generated tokens by writer, also those of processes of this run that were killed."""
        earlier = self._resumed.generated if self._resumed.run != self._run else Counter()
        return earlier + module.writers.store.tokens_of(self._run)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: "RunModule", checkpoint: dict[str, Any]) -> None:
        """Saves the totals here, since `state_dict` has no access to the module."""
        checkpoint["distillkit_budget"] = {
            "spent_tokens": self.spent_tokens,
            "step_seconds": self.step_seconds,
            "teacher_tokens": self.teacher_tokens,
            "seconds": self._resumed.seconds + pl_module.rounds.seconds,
            "run": self._run,
            "written": dict(self._generated(pl_module)),
            "distinct": dict(self._distinct),
            "seen": {writer: b"".join(sorted(keys)) for writer, keys in self._row_keys.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: "RunModule", checkpoint: dict[str, Any]) -> None:
        """Restores the totals of a resumed run."""
        saved = checkpoint.get("distillkit_budget")
        if saved is None:
            return
        self.spent_tokens, self.step_seconds = saved["spent_tokens"], saved["step_seconds"]
        self.teacher_tokens, self.curation_seconds = saved["teacher_tokens"], saved["seconds"]
        self._resumed = _Resumed(saved["seconds"], saved["run"], Counter(saved["written"]))
        self._distinct = Counter(saved["distinct"])
        self._row_keys = {
            writer: {keys[start : start + 16] for start in range(0, len(keys), 16)}
            for writer, keys in saved["seen"].items()
        }


def _run_name(trainer: Trainer) -> str:
    """The name of the run in this folder, which its first process makes up; empty on all ranks but the first."""
    if not trainer.is_global_zero:
        return ""
    path = Path(trainer.default_root_dir) / RUN_NAME
    name = path.read_text() if path.exists() else ""
    if not name:
        name = secrets.token_hex(8)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, name)
    return name

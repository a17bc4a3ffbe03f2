"""How fast training goes."""

import time
from typing import Any

from lightning import Callback

from distillkit.types import Batch


class Throughput(Callback):
    """Logs `train/tokens_per_s`: response positions trained on per second and rank; no validation, no generation."""

    def __init__(self) -> None:
        self._start = 0.0
        self._tokens, self._seconds = 0, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stops it, and logs the mean over the log interval."""
        self._seconds += time.perf_counter() - self._start
        self._tokens += batch.num_tokens
        pl_module.log("train/tokens_per_s", self._tokens / self._seconds, prog_bar=True)
        if trainer._logger_connector.should_update_logs:
            self._tokens, self._seconds = 0, 0.0

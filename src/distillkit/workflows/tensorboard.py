"""TensorBoard logs of a run."""

import threading
from argparse import Namespace
from typing import Any

from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

METRICS = ("val/kl", "val/nll", "val/acceptance", "val/rouge_l")
"""The metrics by which TensorBoard compares runs."""


def _say_once() -> None:
    """Hides the traceback of the thread that writes the logs, whose error, such as a full disk, the run raises too."""
    before = threading.excepthook
    if getattr(before, "__module__", "") == __name__:
        return

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            before(failure)

    threading.excepthook = hook


class RunTensorBoardLogger(TensorBoardLogger):
    """A TensorBoard logger that writes the run's settings when training starts.

    Lightning's own writes them only together with the value of a metric, such as a made-up -1.

    Args:
        root: Folder of the run.
        name: Name of the folder with the logs.
    """

    def __init__(self, root: str, name: str) -> None:
        super().__init__(root, name=name, default_hp_metric=False)
        _say_once()

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Writes the settings, and which metrics TensorBoard shows beside them."""
        from torch.utils.tensorboard.summary import hparams  # takes a second to import

        super().log_hyperparams(params, metrics, step)
        flat = _sanitize_params(_flatten_dict(vars(params) if isinstance(params, Namespace) else params))
        summaries = hparams(flat, dict.fromkeys(METRICS, 0.0))  # type: ignore[no-untyped-call]
        for summary in summaries:  # only the names of the metrics are in them, not the zeros
            self.experiment._get_file_writer().add_summary(summary)

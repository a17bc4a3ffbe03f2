"""Progress bars of a run: few metrics under short names, and epochs counted from 1."""

from dataclasses import replace
from typing import Any, TypeVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich import get_console

_WIDE = 140
"""Columns of a terminal on which the metrics fit beside a bar; on others they are one below the other."""

_ORDER = ("loss", "kl", "tokens/s", "lr")
"""Metrics that are shown first."""

_Bar = TypeVar("_Bar", bound=ProgressBar)


class RunMetrics(ProgressBar):
    """Numbers as people read them, without the version of the loggers."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the metrics as short texts, those that every run has first."""
        metrics = super().get_metrics(trainer, pl_module)
        names = [name for name in (*_ORDER, *metrics) if name in metrics and name != "v_num"]
        return {name: shorten(metrics[name]) for name in dict.fromkeys(names)}


class RichBar(RunMetrics, RichProgressBar):
    """Lightning's `RichProgressBar` with the metrics of a run."""

    def _init_progress(self, trainer: Trainer) -> None:
        if get_console().width < _WIDE:
            self.theme = replace(self.theme, metrics_text_delimiter="\n")
        super()._init_progress(trainer)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{epoch_label(self.trainer):{len(self.validation_description)}}"


class TextBar(RunMetrics, TQDMProgressBar):
    """Lightning's `TQDMProgressBar` with the metrics of a run."""

    BAR_FORMAT = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Starts the bar of an epoch."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description_str(epoch_label(trainer))


def with_run_metrics(bar: ProgressBar) -> ProgressBar | None:
    """Returns a bar with the metrics of a run in place of one of Lightning's, with its settings.

    Args:
        bar: The trainer's progress bar.

    Returns:
        The bar; None if the trainer's is of another class, which stays as it is.
    """
    replacement = {RichProgressBar: RichBar, TQDMProgressBar: TextBar}.get(type(bar))
    return None if replacement is None else _copied(bar, replacement)


def _copied(bar: ProgressBar, kind: type[_Bar]) -> _Bar:
    copied = kind.__new__(kind)
    vars(copied).update(vars(bar))
    return copied


def epoch_label(trainer: Trainer) -> str:
    """The current epoch, counted from 1, of all epochs if their number is known."""
    epochs = trainer.max_epochs
    return f"Epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")


def shorten(value: object) -> str:
    """A metric as text: three digits, or whole above 1,000."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

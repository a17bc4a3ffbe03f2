"""Plot of a run's curves."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from distillkit.run_folder import Series
from distillkit.schedules.labels import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "Held-out divergence, nats per token": {"val/kl": "KL(p‖q)", "val/nll": "NLL of reference responses"},
    "Held-out agreement": {"val/acceptance": "expected acceptance", "val/rouge_l": "ROUGE-L / 100"},
    "Training loss, nats": {"train/loss": "loss"},
}


def draw(series: Series, path: Path, title: str, schedules: Collection[str]) -> None:
    """Plots held-out metrics, training loss and schedules against optimizer steps into a PNG file.

    Args:
        series: The logged metrics.
        path: The PNG file.
        title: Heading of the figure.
        schedules: Names of the logged schedules, after `train/`.
    """
    curves(series, title, schedules).savefig(path, dpi=110)


def curves(series: Series, title: str, schedules: Collection[str]) -> "Figure":
    """The figure that `draw` saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import, needed only when a run ends
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {**_PANELS, "Schedules": {f"train/{name}": label(name) for name in schedules}}
    for axes, (heading, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.set(title=heading, xlabel="optimizer step")
        for name, caption in names.items():
            points = series.get(name, [])
            if not points:
                continue
            scale = 0.01 if name == "val/rouge_l" else 1.0
            steps, values = zip(*points, strict=True)
            few = len(points) <= 30
            axes.plot(steps, [scale * value for value in values], marker="o" if few else None, label=caption)
            if name.startswith("val/"):
                for index in (0, -1):
                    axes.annotate(
                        f"{scale * values[index]:.2f}",
                        (steps[index], scale * values[index]),
                        textcoords="offset points",
                        xytext=(0, 7),
                        ha="left" if index == 0 else "right",
                    )
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", transform=axes.transAxes)
    figure.suptitle(title)
    return figure

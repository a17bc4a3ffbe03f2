"""The run's curves as a picture."""

import csv
from pathlib import Path

Series = dict[str, list[tuple[int, float]]]

_PANELS = {
    "Held-out divergence, nats per token": {"val/kl": "KL(p‖q)", "val/nll": "NLL of reference responses"},
    "Held-out agreement": {"val/acceptance": "expected acceptance", "val/rouge_l": "ROUGE-L / 100"},
    "Training loss, nats": {"train/loss": "loss"},
    "Schedules": {
        "train/beta": "β",
        "train/alpha_teacher": "α, teacher's responses",
        "train/alpha_student": "α, student's responses",
    },
}


def read_metrics(folder: Path) -> Series:
    """All metrics of the CSV logs below `folder`, those of resumed runs joined: name to (step, value), by step."""
    points: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        points.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in points.items()}


def draw(series: Series, path: Path, title: str) -> None:
    """Draws held-out figures, training loss and schedules against optimizer steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, for the end of a run only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (heading, names) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        axes.set(title=heading, xlabel="optimizer step")
        for name, label in names.items():
            points = series.get(name, [])
            if not points:
                continue
            scale = 0.01 if name == "val/rouge_l" else 1.0
            steps, values = zip(*points, strict=True)
            few = len(points) <= 30
            axes.plot(steps, [scale * value for value in values], marker="o" if few else None, label=label)
            if name.startswith("val/"):
                for place in (0, -1):
                    axes.annotate(
                        f"{scale * values[place]:.2f}", (steps[place], scale * values[place]),
                        textcoords="offset points", xytext=(0, 7), ha="left" if place == 0 else "right",
                    )  # fmt: skip
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", transform=axes.transAxes)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)

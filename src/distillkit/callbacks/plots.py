"""Plot of a run's curves."""

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillkit.errors import readable
from distillkit.evaluation.examples import Example
from distillkit.run_folder import Series, reported_names
from distillkit.schedules.labels import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = {
    "Held-out divergence, nats per token": {
        "val/kl": "KL(p‖q)",
        "val/nll": "NLL of reference responses",
        "val/gold_nll": "NLL of the data's answers",
    },
    "Held-out agreement": {
        "val/acceptance": "expected acceptance",
        "val/rouge_l": "ROUGE-L / 100",
        "val/gold_rouge_l": "ROUGE-L / 100, the data's answers",
    },
    "Gradient norm before clipping": {"train/grad_norm": "gradient norm"},
    "Loss, nats": {"train/loss": "training", "val/loss": "the data's held-out answers"},
}


def draw(series: Series, path: Path, title: str, schedules: Collection[str], answers: Sequence[Example] = ()) -> None:
    """Plots held-out metrics, loss, schedules and what the loss reports against optimizer steps into a PNG file.

    Args:
        series: The logged metrics.
        path: The PNG file.
        title: Heading of the figure.
        schedules: Names of the logged schedules, after `train/`.
        answers: Held-out prompts whose answers before and after training stand below the curves.
    """
    curves(series, title, schedules, answers).savefig(path, dpi=110)


def curves(series: Series, title: str, schedules: Collection[str], answers: Sequence[Example] = ()) -> "Figure":
    """The figure that `draw` saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import, needed only when a run ends
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5 + 0.9 * len(answers)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [7.5, 0.9 * len(answers)]
    areas: Any = figure.subfigures(2, 1, height_ratios=heights) if answers else (figure, None)
    charts, texts = areas
    named = {"Reported by the loss": reported_names(series, schedules), "Schedules": schedules}
    panels = _PANELS | {heading: {f"train/{name}": label(name) for name in names} for heading, names in named.items()}
    for axes, (heading, names) in zip(charts.subplots(2, 3).flat, panels.items(), strict=True):
        axes.set(title=heading, xlabel="optimizer step")
        for name, caption in names.items():
            points = series.get(name, [])
            if not points:
                continue
            scale = 0.01 if name.endswith("rouge_l") else 1.0
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
        if axes.get_ylim()[0] >= 0:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", transform=axes.transAxes)
    charts.suptitle(title)
    if texts is not None:
        _write_answers(texts.subplots(), answers)
    return figure


def _write_answers(axes: "Axes", answers: Sequence[Example]) -> None:
    """Writes prompts with the reference and the student's answers before and after, in four columns."""
    columns = {"prompt": 0.0, "reference": 0.2, "student before": 0.47, "student after": 0.74}
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(answers) + 0.4, 0))
    for heading, left in columns.items():
        axes.text(left, 0.2, heading, weight="bold", va="center")
    for index, row in enumerate(answers):
        cells = (row.prompt, row.reference, row.before, row.after)
        for cell, left, width in zip(cells, columns.values(), (34, 46, 46, 46), strict=True):
            lines = textwrap.wrap(readable(" ".join(cell.split())), width, max_lines=4, placeholder=" …")
            axes.text(left, index + 0.45, "\n".join(lines), va="top", fontsize=9, parse_math=False)

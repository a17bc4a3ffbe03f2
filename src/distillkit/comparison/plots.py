"""Plots of a comparison: learning curves and schedules of several methods, as SVG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distillkit.comparison.outcome import Outcome
from distillkit.schedules.labels import label

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG

AXES = ("optimizer steps", "response tokens trained on", "seconds of training and curation")
_MARKERS = "osD^vPX*<>ph"


def learning_curves(outcomes: Sequence[Outcome], metric: str = "val/kl", label: str = "held-out KL(p‖q)") -> str:
    """A metric against steps, tokens and seconds: one line per run, one colour per method."""
    methods = list(dict.fromkeys(run.method for run in outcomes if run.curve(metric)))
    canvas, axes = _panels(len(AXES), 4.6)
    for column, name in enumerate(AXES):
        axes[column].set(xlabel=name, ylabel=f"{label}, nats per token" if column == 0 else "")
        for run in outcomes:
            points = run.curve(metric)
            if points:
                index = methods.index(run.method)
                axes[column].plot(
                    [point[column] for point in points],
                    [point[3] for point in points],
                    color=_colour(index),
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.2,
                    alpha=0.85,
                    label=_legend_label(outcomes, run, metric),
                )
        axes[column].grid(alpha=0.3)
    return _svg(canvas, axes)


def schedule_curves(outcomes: Sequence[Outcome]) -> str:
    """The values of the schedules in each step, one panel per name, for the methods that have them; empty if none."""
    logged = dict.fromkeys(f"train/{name}" for run in outcomes for name in run.schedules)
    names = [name for name in logged if any(run.curve(name) for run in outcomes)]
    if not names:
        return ""
    methods = list(dict.fromkeys(run.method for run in outcomes if any(run.curve(name) for name in names)))
    canvas, axes = _panels(len(names), 4.0)
    for column, name in enumerate(names):
        axes[column].set(xlabel=AXES[0], title=label(name.removeprefix("train/")))
        for run in outcomes:
            points = run.curve(name)
            if points:
                axes[column].plot(
                    [point[0] for point in points],
                    [point[3] for point in points],
                    linewidth=1.2,
                    alpha=0.85,
                    color=_colour(methods.index(run.method)),
                    label=_legend_label(outcomes, run, name),
                )
        axes[column].set_ylim(bottom=0)
        axes[column].grid(alpha=0.3)
    return _svg(canvas, axes)


def _legend_label(outcomes: Sequence[Outcome], run: Outcome, metric: str) -> str | None:
    """The method's name for its first run with the metric, None for its later runs: one legend entry per method."""
    first = next(outcome for outcome in outcomes if outcome.method == run.method and outcome.curve(metric))
    return run.method if run is first else None


def _colour(index: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    colour: tuple[float, ...] = colormaps["tab20"]((index * 2) % 20 + (index >= 10))
    return colour


def _panels(count: int, height: float) -> "tuple[FigureCanvasSVG, Sequence[Axes]]":
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # imported late: takes a second, only reports need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.2 * count, 6.0), height), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    return canvas, figure.subplots(1, count, squeeze=False)[0]


def _svg(canvas: "FigureCanvasSVG", axes: "Sequence[Axes]") -> str:
    """The figure as SVG, with one legend below it."""
    import matplotlib

    entries: dict[str, Artist] = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    canvas.figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 6), frameon=False
    )
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distillkit", "font.family": "sans-serif"}):
        canvas.figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

"""Plots of a comparison: learning curves, schedules and other logged values of several methods, as SVG.

A method is a line through the means over its seeds, in a band from the smallest to the largest of them.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillkit.comparison.outcome import Outcome
from distillkit.run_folder import reported_names
from distillkit.schedules.labels import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("optimizer steps", "response tokens trained on", "seconds of training and curation")
_MARKERS = "osD^vPX*<>ph"
_SIZE = (4.2, 3.5)
"""Inches of a panel: one of them fills the width of a phone."""


@dataclass(frozen=True)
class Picture:
    """Panels that are shown beside one another, or one below the other where there is no room.

    Args:
        panels: SVG files, of which the last is the legend; none if there is nothing to show.
    """

    panels: tuple[str, ...] = ()


def learning_curves(outcomes: Sequence[Outcome], metric: str = "val/kl", label: str = "held-out KL(p‖q)") -> Picture:
    """A metric against steps, tokens and seconds: one line per method."""
    methods = list(dict.fromkeys(run.method for run in outcomes if run.curve(metric)))

    def panel(column: int) -> Callable[["Axes"], None]:
        def draw(axes: "Axes") -> None:
            axes.set(xlabel=AXES[column], ylabel=f"{label}, nats per token")
            for index, method in enumerate(methods):
                _draw_band(axes, _band(outcomes, method, metric, column), index, marks=True)

        return draw

    return _picture(methods, [panel(column) for column in range(len(AXES))], marks=True)


def schedule_curves(outcomes: Sequence[Outcome]) -> Picture:
    """The values of the schedules in each step, one panel per name, for the methods that have them."""
    names = dict.fromkeys(name for run in outcomes for name in run.schedules)
    return _step_curves(outcomes, list(names))


def reported_curves(outcomes: Sequence[Outcome]) -> Picture:
    """Metrics that the losses report in each step besides their value, one panel per name."""
    names = dict.fromkeys(name for run in outcomes for name in reported_names(run.series, run.schedules))
    return _step_curves(outcomes, list(names))


def _step_curves(outcomes: Sequence[Outcome], names: Sequence[str]) -> Picture:
    """Values by optimizer step.

    Args:
        outcomes: The runs.
        names: Names of the values, after `train/`.
    """
    shown = [name for name in names if any(run.curve(f"train/{name}") for run in outcomes)]
    curves = [f"train/{name}" for name in shown]
    methods = list(dict.fromkeys(run.method for run in outcomes if any(run.curve(name) for name in curves)))

    def panel(name: str) -> Callable[["Axes"], None]:
        def draw(axes: "Axes") -> None:
            axes.set(xlabel=AXES[0], title=label(name.removeprefix("train/")))
            for index, method in enumerate(methods):
                _draw_band(axes, _band(outcomes, method, name, 0), index, marks=False)
            if axes.get_ylim()[0] >= 0:
                axes.set_ylim(bottom=0)

        return draw

    return _picture(methods, [panel(name) for name in curves], marks=False)


def _band(outcomes: Sequence[Outcome], method: str, name: str, column: int) -> list[tuple[float, float, float, float]]:
    """Points of a method by step: mean abscissa, mean value, and the smallest and largest value, over the seeds."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in outcomes:
        if run.method == method:
            for point in run.curve(name):
                by_step.setdefault(point[0], []).append((point[column], point[3]))
    points = []
    for _, pairs in sorted(by_step.items()):
        abscissae, values = zip(*pairs, strict=True)
        points.append((sum(abscissae) / len(abscissae), sum(values) / len(values), min(values), max(values)))
    return points


def _draw_band(axes: "Axes", points: Sequence[tuple[float, float, float, float]], index: int, marks: bool) -> None:
    if not points:
        return
    x, mean, low, high = zip(*points, strict=True)
    axes.plot(x, mean, linewidth=1.4, **_style(index, marks))
    if low != high:
        axes.fill_between(x, low, high, color=_colour(index), alpha=0.2, linewidth=0)


def _style(index: int, marks: bool) -> dict[str, Any]:
    marker = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4} if marks else {}
    return {"color": _colour(index), **marker}


def _colour(index: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    colour: tuple[float, ...] = colormaps["tab20"]((index * 2) % 20 + (index >= 10))
    return colour


def _picture(methods: Sequence[str], panels: Sequence[Callable[["Axes"], None]], marks: bool) -> Picture:
    """The panels, each drawn by a function, and their legend."""
    if not methods:
        return Picture()
    figures = []
    for draw in panels:
        figure = _figure()
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.3)
        figures.append(figure)
    return Picture(tuple(_svg(figure) for figure in [*figures, _legend(methods, marks)]))


def _figure() -> "Figure":
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # imported late: takes a second, only reports need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _legend(methods: Sequence[str], marks: bool) -> "Figure":
    from matplotlib.lines import Line2D

    figure = _figure()
    lines = [Line2D([], [], linewidth=1.4, **_style(index, marks)) for index in range(len(methods))]
    figure.legend(lines, list(methods), loc="center left", ncols=1 + len(methods) // 13, frameon=False)
    return figure


def _svg(figure: "Figure") -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distillkit", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

"""Curves of several methods, as SVG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from distillkit.comparison.outcome import Outcome

AXES = ("optimizer steps", "response tokens trained on", "seconds of training and curation")
SCHEDULES = {
    "train/beta": "β",
    "train/alpha": "α",
    "train/alpha_teacher": "α, teacher's responses",
    "train/alpha_student": "α, student's responses",
}
_MARKERS = "osD^vPX*<>ph"


def learning_curves(outcomes: Sequence[Outcome], figure: str = "val/kl", label: str = "held-out KL(p‖q)") -> str:
    """A figure against steps, tokens and seconds: a line for each run, of one colour for each method."""
    methods = list(dict.fromkeys(own.method for own in outcomes if own.curve(figure)))
    canvas, axes = _panels(len(AXES), 4.6)
    for place, name in enumerate(AXES):
        axes[place].set(xlabel=name, ylabel=f"{label}, nats per token" if place == 0 else "")
        for own in outcomes:
            points = own.curve(figure)
            if points:
                number = methods.index(own.method)
                axes[place].plot(
                    [point[place] for point in points], [point[3] for point in points], color=_colour(number),
                    marker=_MARKERS[number % len(_MARKERS)], markersize=4, linewidth=1.2, alpha=0.85,
                    label=own.method if own is _first(outcomes, own.method, figure) else None,
                )  # fmt: skip
        axes[place].grid(alpha=0.3)
    return _svg(canvas, axes)


def schedule_curves(outcomes: Sequence[Outcome]) -> str:
    """What α and β were in each step, of those methods that log them; empty if none does."""
    names = [name for name in SCHEDULES if any(own.curve(name) for own in outcomes)]
    if not names:
        return ""
    methods = list(dict.fromkeys(own.method for own in outcomes if any(own.curve(name) for name in names)))
    canvas, axes = _panels(len(names), 4.0)
    for place, name in enumerate(names):
        axes[place].set(xlabel=AXES[0], title=SCHEDULES[name])
        for own in outcomes:
            points = own.curve(name)
            if points:
                axes[place].plot(
                    [point[0] for point in points], [point[3] for point in points], linewidth=1.2, alpha=0.85,
                    color=_colour(methods.index(own.method)),
                    label=own.method if own is _first(outcomes, own.method, name) else None,
                )  # fmt: skip
        axes[place].set_ylim(bottom=0)
        axes[place].grid(alpha=0.3)
    return _svg(canvas, axes)


def _first(outcomes: Sequence[Outcome], method: str, figure: str) -> Outcome:
    """The run that stands for a method in the legend."""
    return next(own for own in outcomes if own.method == method and own.curve(figure))


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"]((number * 2) % 20 + (number >= 10))


def _panels(count: int, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # a second to import, for a report only
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.2 * count, 6.0), height), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    return canvas, figure.subplots(1, count, squeeze=False)[0]


def _svg(canvas: Any, axes: Sequence[Any]) -> str:
    """The figure with one legend below it."""
    import matplotlib

    entries: Mapping[str, Any] = {
        label: handle for own in axes for handle, label in zip(*own.get_legend_handles_labels(), strict=True)
    }
    canvas.figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 6), frameon=False
    )
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distillkit", "font.family": "sans-serif"}):
        canvas.figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

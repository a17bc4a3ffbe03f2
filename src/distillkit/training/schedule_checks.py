"""Checks of the schedules within a loss and a curator, and of the names under which a run logs them."""

from collections.abc import Iterable

from torch import Tensor

from distillkit.errors import PluginError
from distillkit.interfaces import Curator, Loss, Schedule

RUN_NAMES = frozenset(
    {
        "loss",
        "lr",
        "grad_norm",
        "skipped_steps",
        "spent_tokens",
        "spent_seconds",
        "tokens_per_s",
        "body_tokens_per_s",
        "peak_memory_gb",
        "mfu",
    }
)
"""Names that every run logs of a training step, as `train/loss`: no metric or schedule may have such a name."""


def check_schedules(loss: Loss, curator: Curator) -> None:
    """Checks that each schedule is updated and logged, and has a value that is a tensor.

    Args:
        loss: The loss.
        curator: The curator.

    Raises:
        PluginError: If the value of a schedule is no 0-dim tensor, if a part holds a schedule where it would never be
            updated, or if a schedule of the loss has a name that the run itself logs.
    """
    for part in (loss, curator):
        for name in (*unlogged_schedules(part), *_unregistered_schedules(part)):
            raise PluginError(
                f"{type(part).__name__}.{name} holds a schedule that is never updated: assign each schedule to an "
                f"attribute of its own, as in self.q = q, or write update() and schedules() of {type(part).__name__}."
            )
        for schedule in part.schedules().values():
            _check_value(schedule)
    check_names(f"{type(loss).__name__}, as a schedule,", loss.schedules())


def check_names(origin: str, names: Iterable[str]) -> None:
    """Checks that no metric has the name of one that the run itself logs.

    Args:
        origin: What logs them, as the message begins.
        names: Names of metrics or schedules, without `train/`.

    Raises:
        PluginError: If one has such a name.
    """
    for name in sorted(RUN_NAMES.intersection(names)):
        raise PluginError(f"{origin} logs {name!r}, but train/{name} is logged by the run itself: choose another name.")


def unlogged_schedules(part: Loss | Curator) -> list[str]:
    """Names of the schedules within a part that `schedules` leaves out, except those within another schedule."""
    modules = dict(part.named_modules())
    outer = {
        name: module
        for name, module in modules.items()
        if isinstance(module, Schedule) and not any(isinstance(modules[above], Schedule) for above in _above(name))
    }
    logged = {id(schedule) for schedule in part.schedules().values()}
    return [name for name, schedule in outer.items() if id(schedule) not in logged]


def _unregistered_schedules(part: Loss | Curator) -> list[str]:
    """Names of attributes that are lists, tuples or dicts with a schedule that is no module of the part."""
    registered = {id(module) for module in part.modules()}
    missing = []
    for name, value in vars(part).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if any(isinstance(item, Schedule) and id(item) not in registered for item in items):
            missing.append(name)
    return [name for name in missing if name != "_settings"]


def _check_value(schedule: Schedule) -> None:
    value: object = schedule.value
    if isinstance(value, Tensor) and value.dim() == 0:
        return
    described = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"the {type(value).__name__} {value!r}"
    raise PluginError(
        f"{type(schedule).__name__}.value must be a 0-dim tensor, got {described}: keep it in a buffer "
        "(register_buffer), which checkpoints save."
    )


def _above(name: str) -> list[str]:
    """The names of the modules that contain a module."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]

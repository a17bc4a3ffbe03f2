"""Verbs that a signal stops: what is saved and how to go on, in two lines; and the verbs that run for long."""

import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from distillkit.devices.stopping import StopRequested, stop_signals

_KEEPS = {
    "chat": "Conversations are not saved",
    "compare": "Finished runs are saved, and the others up to their last checkpoint",
    "store": "Files that are complete are saved, and no other is left",
}
"""Description of the saved state of verbs that have no run."""


def run_stoppable(run: Callable[[str, list[str]], int], verb: str, arguments: list[str]) -> int:
    """Runs a verb; if Ctrl-C or SIGTERM stops it, prints what is saved and the command to go on with.

    Args:
        run: Runs a verb with its arguments.
        verb: Name of the verb.
        arguments: What follows it on the command line.

    Returns:
        The exit status: 143 after SIGTERM, 130 after Ctrl-C.

    Raises:
        DistillKitError: If the verb fails.
    """
    try:
        with stop_signals():
            return run(verb, arguments)
    except StopRequested as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each rank is stopped
            print("\n".join(_farewell(verb, arguments, stop)), file=sys.stderr)
        return stop.status


def _farewell(verb: str, arguments: Sequence[str], stop: StopRequested) -> tuple[str, str]:
    saved = f"Saved: {' and '.join(stop.saved)}" if stop.saved else _KEEPS.get(verb, "Nothing was saved")
    goes_on = bool(stop.saved) or verb == "compare"
    command = shlex.join(["distillkit", verb, *_without_checkpoint(arguments, stop.arguments), *stop.arguments])
    return f"distillkit {verb}: {stop}. {saved}.", f"{'Go on' if goes_on else 'Start again'} with: {command}"


def _without_checkpoint(arguments: Sequence[str], added: Sequence[str]) -> list[str]:
    """The arguments without the option that is added, and its value."""
    option = added[0] if added else None
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if option not in (before, word.partition("=")[0])]


def run(verb: str, arguments: list[str]) -> int:
    """Runs a verb of those that train, generate, measure or talk.

    Args:
        verb: Name of the verb.
        arguments: What follows it on the command line.

    Raises:
        DistillKitError: If the verb fails.
    """
    if verb == "chat":
        from distillkit.cli import chat

        return chat.run(arguments)
    if verb == "compare":
        from distillkit.cli import compare

        return compare.run(arguments)
    with _collection_paused():
        from distillkit.cli import curate, evaluate
        from distillkit.workflows import launch, logs

    logs.show_logs()
    if verb == "curate":
        return curate.run(arguments)
    if verb == "evaluate":
        return evaluate.run(arguments)
    return launch.run(verb, arguments)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pauses garbage collection during the first imports.

    They make a million objects that stay: to look through them for garbage, again and again, takes a sixth of their
    time. Later collections pass over them too.
    """
    is_first = "lightning" not in sys.modules and gc.isenabled()
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.enable()
            gc.freeze()

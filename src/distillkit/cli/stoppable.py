"""The verbs that run for long, and what the command says when a signal stops one."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distillkit.devices.stopping import StopRequested, stop_signals

_HINTS = {
    "fit": "Go on with the same command and `--ckpt_path last` if the run has a checkpoint; responses are saved.",
    "curate": "Responses are saved: go on with the same command.",
    "compare": "Go on with the same command.",
}


def run(verb: str, arguments: list[str]) -> int:
    """Runs a verb.

    Args:
        verb: Name of the verb.
        arguments: What follows it on the command line.

    Returns:
        The exit status: 143 after SIGTERM, 130 after Ctrl-C.

    Raises:
        DistillKitError: If the verb fails.
    """
    try:
        with stop_signals():
            return _run(verb, arguments)
    except StopRequested as stop:
        print(f"distillkit {verb}: {stop}. {_HINTS.get(verb, '')}".rstrip(), file=sys.stderr)
        return stop.status


def _run(verb: str, arguments: list[str]) -> int:
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

"""The verbs that run for long, and what the command says when a signal stops one."""

import sys

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
    if verb == "chat":
        from distillkit.cli import chat

        return chat.run(arguments)
    if verb == "compare":
        from distillkit.cli import compare

        return compare.run(arguments)
    from distillkit.cli import curate, evaluate
    from distillkit.workflows import launch, logs

    logs.show_logs()
    if verb == "curate":
        return curate.run(arguments)
    if verb == "evaluate":
        return evaluate.run(arguments)
    return launch.run(verb, arguments)

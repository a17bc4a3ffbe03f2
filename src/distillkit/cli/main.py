"""The `distillkit` command. Each verb imports its own modules when it runs, so that the command starts fast."""

import io
import os
import select
import sys

from distillkit.cli.stoppable import run_stoppable
from distillkit.errors import DistillKitError

VERBS = {
    "init": "write a small folder that runs as it is",
    "fit": "train a student",
    "curate": "generate the responses of the first round before training",
    "validate": "measure a checkpoint on the validation prompts",
    "test": "measure a checkpoint on the test prompts",
    "evaluate": "measure a student on held-out prompts and write its metrics to a file",
    "export": "write the student of a run as a folder for transformers and vLLM",
    "chat": "talk with a student beside its teacher",
    "compare": "train several methods at equal cost and write a report",
    "store": "inspect, merge and export response stores, and verify stored files",
    "methods": "list the methods that can be run, or print the file of one",
    "plugins": "list the installed parts",
    "new-plugin": "create a package for your own part",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit status. A `DistillKitError` is printed as one line, with exit status 1."""
    arguments = sys.argv[1:] if argv is None else argv
    _show_any_character()
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        status = run_stoppable(_run, verb, rest)
        sys.stdout.flush()
        return status
    except DistillKitError as error:
        return _fail(verb, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            return 141  # as of a process that SIGPIPE ends
        if os.environ.get("DISTILLKIT_TRACEBACK"):
            raise
        return _fail(verb, f"{_cause(error)}. Set DISTILLKIT_TRACEBACK=1 to see where.")


def _run(verb: str, rest: list[str]) -> int:
    """Imports a verb's modules and runs it."""
    if verb in ("-h", "--help", "--version"):
        print(_version() if verb == "--version" else _usage())
        return 0
    if verb == "plugins":
        from distillkit.cli import plugins

        return plugins.run(rest)
    if verb == "methods":
        from distillkit.cli import methods

        return methods.run(rest)
    if verb == "new-plugin":
        from distillkit.cli import new_plugin

        return new_plugin.run(rest)
    if verb == "store":
        from distillkit.cli import store

        return store.run(rest)
    if verb == "init":
        from distillkit.cli import init

        return init.run(rest)
    if verb == "export":
        from distillkit.cli import export

        return export.run(rest)
    if verb not in VERBS:
        print(f"distillkit: error: {_unknown(verb)}", file=sys.stderr)
        return 2
    from distillkit.cli import help_pages
    from distillkit.cli.stoppable import run
    from distillkit.config import part_help

    if verb in help_pages.PAGES:
        topic = help_pages.topic(rest)
        if topic in ("", "all"):
            print(help_pages.page(verb))
        if topic == "" or part_help.run(rest):
            return 0
        if topic == "all":
            rest = ["--help"]
    return run(verb, rest)


def _show_any_character() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes, where that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def _reader_has_ended() -> bool:
    """True if nothing reads the output any more, as after `| head`; the rest of it is discarded then."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _fail(verb: str, message: str) -> int:
    print(f"distillkit {verb}: error: {message}", file=sys.stderr)
    return 1


def _cause(error: OSError) -> str:
    """The reason and the file of an error of the operating system."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename is not None else reason


def _version() -> str:
    from distillkit import __version__

    return f"distillkit {__version__}"


def _unknown(verb: str) -> str:
    import difflib  # which the other verbs need not wait for

    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown verb {verb!r}.{hint} Use one of {', '.join(VERBS)}."


def _usage() -> str:
    lines = [f"  {verb:<10} {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        ["usage: distillkit VERB ...", "", *lines, "", "Run `distillkit VERB --help` for the options of a verb."]
    )


if __name__ == "__main__":
    sys.exit(main())

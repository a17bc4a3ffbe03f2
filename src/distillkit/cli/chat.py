"""The verb `chat`: a conversation with a student beside its teacher, on a terminal or through a pipe."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from distillkit.devices.stopping import StopRequested
from distillkit.errors import DistillKitError, check_range

if TYPE_CHECKING:
    from distillkit.workflows.chat import Speaker

_HELP = "/new starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def run(argv: list[str]) -> int:
    """Runs `distillkit chat`.

    Args:
        argv: The arguments after `distillkit chat`.

    Returns:
        The exit status, 0.

    Raises:
        DistillKitError: If an option can't be followed, or a model can't be loaded.
    """
    arguments = _parser().parse_args(argv)
    check_range("--max-new-tokens", arguments.max_new_tokens, 1)
    check_range("--temperature", arguments.temperature, 0.0)
    # Here: these take seconds, which --help need not wait for.
    from distillkit.workflows.chat import find_subject, load_speakers
    from distillkit.workflows.logs import show_logs

    show_logs(on_stderr=True)
    subject = find_subject(arguments.source)
    speakers = load_speakers(subject, arguments.teacher, not arguments.no_teacher, arguments.system)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _introduce(speakers, arguments.no_teacher)
    for text in _messages(is_terminal):
        if text == "/quit":
            break
        if text == "/new":
            system = subject.system if arguments.system is None else arguments.system
            for speaker in speakers:
                speaker.start(system)
            continue
        for speaker in speakers:
            name = f"{speaker.name}: " if len(speakers) > 1 else ""
            _answer(partial(speaker.answer, text, arguments.max_new_tokens, arguments.temperature), name, is_terminal)
        if is_terminal:
            print()
    return 0


def _introduce(speakers: "list[Speaker]", is_alone: bool) -> None:
    for speaker in speakers:
        print(f"{speaker.name:<8} {speaker.origin}")
    if len(speakers) == 1 and not is_alone:
        print(f"{'teacher':<8} not recorded: name it with --teacher SOURCE to compare")
    if speakers[0].messages:
        print(f"{'system':<8} {speakers[0].messages[0]['content']}")
    print(f"{_HELP}\n")


def _messages(is_terminal: bool) -> Iterator[str]:
    """The user's messages, one a line, without empty ones."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for `input`
    while True:
        try:
            line = input("> ") if is_terminal else next(sys.stdin, None)
        except EOFError:
            print()
            return
        except StopRequested as stop:
            if not (is_terminal and stop.is_interrupt):
                raise
            print(f"\n{_HELP}")
            continue
        if line is None:
            return
        if line.strip():
            yield line.strip()


def _answer(answer: Callable[[Callable[[str], None]], None], name: str, is_terminal: bool) -> None:
    """Prints an answer after its speaker's name. On a terminal Ctrl-C or an error ends it, otherwise the command."""
    try:
        print(name, end="", flush=True)
        answer(_show)
        print(flush=True)
    except DistillKitError as error:
        if not is_terminal:
            raise
        print(error)
    except StopRequested as stop:
        if not (is_terminal and stop.is_interrupt):
            raise
        print(" [stopped]", flush=True)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit chat",
        description="Talks with a student beside its teacher, each in a conversation of its own. Without a terminal it "
        "reads a message a line (`echo Hi | distillkit chat out`) and prints the answers alone.",
        epilog=f"On a terminal: {_HELP}",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|FOLDER", help="a run's folder, a checkpoint or an exported student")
    parser.add_argument("--teacher", metavar="SOURCE", help="the teacher; by default that of the run or the model card")
    parser.add_argument("--no-teacher", action="store_true", help="talk with the student alone")
    parser.add_argument(
        "--system", metavar="TEXT", help="system message; by default that of the training prompts, '' for none"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the most likely token"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, by default 256")
    return parser

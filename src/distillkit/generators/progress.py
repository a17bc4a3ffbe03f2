"""A progress bar with tokens per second."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int, int], None]

_outer: ContextVar[Advance | None] = ContextVar("outer", default=None)


@contextmanager
def token_bar(label: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """Shows on a terminal how many of `total` things are done and how fast tokens come; a bar within a bar joins it.

    Args:
        label: What is being done.
        total: How many things there are.
        shown: Whether anything is shown.

    Yields:
        A function that takes how many things, and how many tokens, have been done since the last call.
    """
    outer = _outer.get()
    if outer is not None:
        yield outer
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} tokens/s"), TimeRemainingColumn(),
    )  # fmt: skip
    console = get_console()
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(label, total=total, rate="-")
        start, tokens = time.perf_counter(), 0

        def advance(done: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            progress.update(task, advance=done, rate=f"{tokens / (time.perf_counter() - start):.0f}")

        token = _outer.set(advance)
        try:
            yield advance
        finally:
            _outer.reset(token)

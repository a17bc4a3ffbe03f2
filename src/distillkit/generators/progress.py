"""Progress bar that shows tokens per second."""

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
    """Shows on a terminal how many of `total` items are done and the token rate; a nested bar advances the outer one.

    Args:
        label: Text in front of the bar.
        total: Number of items.
        shown: Whether the bar is displayed.

    Yields:
        A function that takes the numbers of items and of tokens that were finished since the last call.
    """
    outer = _outer.get()
    if outer is not None:
        yield outer
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
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

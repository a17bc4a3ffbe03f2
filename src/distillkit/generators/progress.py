"""A progress bar with tokens per second."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def token_bar(label: str, total: int, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of `total` things are done and how fast tokens come.

    Args:
        label: What is being done.
        total: How many things there are.
        shown: Whether anything is shown.

    Yields:
        A function that takes how many things, and how many tokens, have been done since the last call.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} tokens/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True, disable=not shown) as progress:
        task = progress.add_task(label, total=total, rate="-")
        start, tokens = time.perf_counter(), 0

        def advance(done: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            progress.update(task, advance=done, rate=f"{tokens / (time.perf_counter() - start):.0f}")

        yield advance

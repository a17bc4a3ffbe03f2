"""Processes that encode batches of records, and their program (`python -m distillkit.data.encoding_worker`).

Not `multiprocessing`: its processes run the main script again, which a script without a guard would not survive.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from distillkit.errors import DataError
from distillkit.types import Prompt, Record

Results = list[Prompt | DataError]
Encode = Callable[[Sequence[Record]], Results]
"""Encodes a batch of records; it can be pickled."""


def encode_in_processes(encode: Encode, batches: Iterable[Sequence[Record]], num_processes: int) -> Iterator[Results]:
    """Encodes batches in other processes.

    Args:
        encode: Encodes one batch.
        batches: The batches.
        num_processes: Number of processes, each with one thread.

    Yields:
        The results of each batch, in order.
    """
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(num_processes):
            idle.put(stack.enter_context(_Worker(encode)))
        threads = stack.enter_context(ThreadPoolExecutor(num_processes))

        def run(batch: Sequence[Record]) -> Results:
            worker = idle.get()
            try:
                return worker.run(batch)
            finally:
                idle.put(worker)

        pending: deque[Future[Results]] = deque()
        for batch in batches:
            pending.append(threads.submit(run, batch))
            if len(pending) > 2 * num_processes:  # no more results in memory than that
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Worker:
    """A process that encodes batches until it is closed.

    Args:
        encode: Encodes one batch.
    """

    def __init__(self, encode: Encode) -> None:
        command = [sys.executable, "-m", "distillkit.data.encoding_worker"]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | paths)
        self._send(encode)

    def run(self, batch: Sequence[Record]) -> Results:
        """The results of one batch.

        Raises:
            Exception: What was raised in the process.
        """
        self._send(batch)
        assert self._process.stdout is not None
        try:
            results = pickle.load(self._process.stdout)
        except EOFError as error:
            status = self._process.wait()
            raise DataError(
                f"A process that encodes the data ended with status {status}, perhaps for want of memory: make room "
                "and run the same command again."
            ) from error
        if isinstance(results, Exception):
            raise results
        return list(results)

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that does not come says so

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Encodes each batch of the standard input, after the function that does it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    stream, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    encode: Encode = pickle.load(stream)
    while True:
        try:
            batch: Any = pickle.load(stream)
        except EOFError:
            return
        try:
            results: Any = encode(batch)
        except Exception as error:  # raised again where the batch comes from
            results = error
        pickle.dump(results, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()

"""Streams, events and memory of the simulated GPU, and the watch that is kept over them.

Each stream has a clock: how far into the queue of every stream its next operation is known to come. Each storage has
its last write and its last reads. An operation that uses a storage must come after the uses that it could disturb.
"""

import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class HostTensorError(AssertionError):
    """An operation got tensors of the device and of the host."""


class RaceError(AssertionError):
    """Two streams use the same memory without an order between them."""


class HostMemoryError(AssertionError):
    """Pinned memory was written to while a copy from it was under way."""


_streams: "weakref.WeakSet[SimStream]" = weakref.WeakSet()


class SimStream:
    """A queue of operations; `clock` is how far into each stream's queue it is known to come after."""

    _count = 0

    def __init__(self, device: Any = None, **_: Any) -> None:
        SimStream._count += 1
        self.number = SimStream._count
        self.clock: dict[int, int] = {self.number: 0}
        _streams.add(self)

    def wait_stream(self, other: "SimStream") -> None:
        """What comes next in this stream starts after what `other` was given so far."""
        for number, tick in other.clock.items():
            self.clock[number] = max(self.clock.get(number, 0), tick)

    def wait_event(self, event: "SimEvent") -> None:
        """What comes next in this stream starts after `event`."""
        for number, tick in event.clock.items():
            self.clock[number] = max(self.clock.get(number, 0), tick)

    def synchronize(self) -> None:
        """The host waits for this stream."""
        WATCH.host_waits(self)

    def comes_after(self, number: int, tick: int) -> bool:
        """Whether this stream is known to come after operation `tick` of stream `number`."""
        return self.clock.get(number, 0) >= tick


class SimEvent:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing
        self.clock: dict[int, int] = {}

    def record(self, stream: SimStream | None = None) -> None:
        """The event happens when what `stream` was given so far is done."""
        self.clock = dict((stream or WATCH.stream()).clock)

    def synchronize(self) -> None:
        """The host waits for the event."""
        assert self.clock, "an event was waited for that was never recorded"
        WATCH.waits += 1
        WATCH.done = max(WATCH.done, self.clock.get(WATCH.default.number, 0))

    def elapsed_time(self, end: "SimEvent") -> float:
        """Milliseconds."""
        assert self.enable_timing, "the event takes no time"
        ticks = max(event.clock.get(WATCH.default.number, 0) for event in (self, end))
        assert ticks <= WATCH.done, "the event may not have happened yet: the host did not wait for it"
        assert all(end.clock.get(number, 0) >= tick for number, tick in self.clock.items()), "the events' order"
        return 1.0 + sum(end.clock.values()) - sum(self.clock.values())


class Memory:
    """One storage: which stream it was given out to, and who used it last."""

    def __init__(self, stream: SimStream) -> None:
        self.stream = stream
        self.written = (stream.number, stream.clock[stream.number])
        self.read: dict[int, int] = {}
        self.recorded: set[int] = set()


class Watch:
    """Everything that is known of the device; one for the process."""

    def __init__(self) -> None:
        self.waits = self.synchronized = 0
        self.wait_sites: Counter[str] = Counter()
        self.operations: Counter[int] = Counter()  # by the number of their stream
        self.done = 0  # operations of the default stream that the host knows to be done
        self.default = SimStream()
        self.lock = threading.RLock()
        self.memory: weakref.WeakKeyDictionary[Any, Memory] = weakref.WeakKeyDictionary()
        self.freed: dict[int, list[tuple[int, int]]] = {}
        self.copies: list[tuple[torch.Tensor, int]] = []
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self.random = torch.Generator().manual_seed(0)
        self._local = threading.local()

    def stream(self) -> SimStream:
        """The current stream of this thread."""
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def using(self, stream: SimStream) -> Iterator[None]:
        """Operations of this thread go to `stream`."""
        before = self.stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def host_waits(self, stream: SimStream | None = None) -> None:
        """The host waits for a stream, or for all; copies from pinned memory are then done.

        What the host gives out from then on, to the default stream or to its thread's, comes after it. (A thread that
        was not told gives out work too: such a race is not seen.)
        """
        self.waits += 1
        self.wait_sites[_site()] += 1
        self.done = self.default.clock[self.default.number]
        for source, version in self.copies:
            if source._version != version:
                raise HostMemoryError("Pinned memory was written to while a copy from it was under way.")
        self.copies.clear()
        for done in list(_streams) if stream is None else [stream]:
            self.default.wait_stream(done)
            self.stream().wait_stream(done)

    def operation(self, name: str, read: list[Any], written: list[Any]) -> None:
        """An operation goes to the current stream.

        Args:
            name: Of the operation.
            read: Storages that it reads.
            written: Storages that it writes to, new ones included.
        """
        stream = self.stream()
        self.operations[stream.number] += 1
        stream.clock[stream.number] += 1
        tick = stream.clock[stream.number]
        for storage in [*read, *written]:
            memory = self.memory.get(storage)
            if memory is not None and not stream.comes_after(*memory.written):
                raise RaceError(f"{name} uses what another stream writes, without a wait.")
        for storage in read:
            if storage in self.memory:
                self.memory[storage].read[stream.number] = tick
        for storage in written:
            memory = self.memory.get(storage)
            if memory is None:
                self._give_out(name, storage, stream)
            elif not all(stream.comes_after(*use) for use in memory.read.items()):
                raise RaceError(f"{name} writes to what another stream reads, without a wait.")
            else:
                memory.written = (stream.number, tick)

    def _give_out(self, name: str, storage: Any, stream: SimStream) -> None:
        for use in self.freed.pop(stream.number, []):
            if not stream.comes_after(*use):
                raise RaceError(f"{name} is given memory that another stream still uses: record_stream is missing.")
        memory = Memory(stream)
        self.memory[storage] = memory
        weakref.finalize(storage, self._take_back, memory)

    def _take_back(self, memory: Memory) -> None:
        uses = [*memory.read.items(), memory.written]
        waiting = [use for use in uses if use[0] != memory.stream.number and use[0] not in memory.recorded]
        self.freed.setdefault(memory.stream.number, []).extend(waiting)


def _site() -> str:
    """The line of the package that is being run, and the library's line that waits."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent != Path(__file__).parent]
    of_package = [frame for frame in frames if "/distillkit" in frame.filename and "/tests/" not in frame.filename]
    lines = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in (*of_package[-1:], *frames[-1:])]
    return " via ".join(dict.fromkeys(lines))


WATCH = Watch()

"""Streams and events of accelerators that run asynchronously to the host.

All code that handles such a device goes through `backend`. No device type is named anywhere else, so a simulated
accelerator that is registered with torch under its own name takes the same branches as a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def backend(device: torch.device) -> Any:
    """Returns torch's module for an accelerator with streams, such as `torch.cuda`.

    Args:
        device: Any device.

    Returns:
        The module; None for the CPU, `meta`, and accelerators without streams (MPS).
    """
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "Stream") else None


_side_streams: dict[tuple[torch.device, str], Any] = {}


def side_stream(device: torch.device, name: str) -> Any:
    """Returns the side stream of `device` with this name, created at the first call; `device` must have a backend.

    torch's allocator keeps freed memory for the stream it was allocated on: a new stream at each call would reserve new
    memory at each call.
    """
    if (device, name) not in _side_streams:
        _side_streams[device, name] = backend(device).Stream(device)
    return _side_streams[device, name]


def writer_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context for the stream on which rounds are generated ahead of training.

    Its work starts after the work already queued on the current stream. Call this in the thread that hands out the
    work, and enter the context in the thread that does it. On a device without streams the context does nothing.
    """
    module = backend(device)
    if module is None:
        return nullcontext()
    stream = side_stream(device, "writer")
    stream.wait_stream(module.current_stream(device))
    context: AbstractContextManager[Any] = module.stream(stream)
    return context


class Ready:
    """An event on the current stream: once it has passed, other streams of the device may use what was computed.

    Args:
        device: The device that computes it.
    """

    def __init__(self, device: torch.device) -> None:
        module = backend(device)
        self._device, self._event = device, None if module is None else module.Event()
        if self._event is not None:
            self._event.record(module.current_stream(device))

    def wait(self) -> None:
        """Makes the current stream wait for the event before it starts further work; the host does not wait."""
        if self._event is not None:
            backend(self._device).current_stream(self._device).wait_event(self._event)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to `device` without waiting for the work queued there.

    CUDA waits for the stream before it reads more than 64 KiB of memory that is not pinned.
    """
    if backend(device) is None:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Waits on the host until the device has finished all queued work; does nothing on a device without streams."""
    module = backend(device)
    if module is not None:
        module.synchronize(device)

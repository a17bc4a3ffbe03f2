"""Memory budget: the number of positions per slice and block, from the measured memory use of a loss.

Letters: N response positions, n positions of a slice, m of a block, V vocabulary.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.devices.streams import backend
from distillkit.types import Scores

MIB = 2**20
CPU_BUDGET = 304 * MIB
"""Default budget on the CPU, where larger slices hardly speed up the matrix products; halved in half precision."""
CPU_BLOCK = 4 * MIB
"""Size of one tensor of a block on the CPU: small enough that the loss works in the cache."""
DEVICE_SHARE = 1 / 32
"""Default budget on an accelerator, as a share of its memory."""
LARGEST_DEVICE_BUDGET = 2048 * MIB
"""Upper limit of the default budget on an accelerator."""

_bytes_per_position: weakref.WeakKeyDictionary[object, dict[Hashable, int]] = weakref.WeakKeyDictionary()
"""Measured peak memory of each loss for a block of one position."""


def default_budget(device: torch.device) -> int:
    """Returns the default number of bytes that a loss may use at a time, not counting its gradients."""
    module = backend(device)
    if module is None:
        return CPU_BUDGET
    return min(int(module.get_device_properties(device).total_memory * DEVICE_SHARE), LARGEST_DEVICE_BUDGET)


class Budget:
    """Divides the memory between slices, on which the heads work, and blocks, on which the loss works.

    Args:
        owner: The loss. Its memory use is measured once and cached for this object.
        student: Scores that the loss is evaluated on; their vocabulary, dtype and `slicing` are used.
        tensors: Dtypes of the `[n, V]` tensors that a slice needs.
    """

    def __init__(self, owner: object, student: Scores, tensors: Sequence[torch.dtype]) -> None:
        hidden, memory = student.hidden, student.slicing.memory
        self.owner = owner
        self.key = (student.vocab, hidden.dtype, tensors[0], hidden.device.type, torch.is_grad_enabled())
        total = default_budget(hidden.device) if memory is None else memory * MIB
        on_cpu = hidden.device.type == "cpu"
        if on_cpu and memory is None and tensors[0].itemsize < 4:
            total //= 2
        self.block_bytes = min(total // 4, 8 * CPU_BLOCK) if on_cpu else total // 4
        wide = 8 if hidden.dtype == torch.float64 else 4
        cached = min(CPU_BLOCK, self.block_bytes // 2) if on_cpu else self.block_bytes // 2
        self.cached = max(1, cached // (wide * student.vocab))
        position_bytes = student.vocab * sum(dtype.itemsize for dtype in tensors)
        self.positions = max(1, (total - self.block_bytes) // position_bytes)
        if student.slicing.max_positions is not None:
            self.positions = min(self.positions, student.slicing.max_positions)

    def block(self, run: Callable[[], object]) -> int:
        """Returns the number of positions in a block, at least 1.

        Args:
            run: Evaluates a block of one position on a copy. Called once per loss, to measure its memory.
        """
        measured = _bytes_per_position.setdefault(self.owner, {})
        if self.key not in measured:
            measured[self.key] = max(1, peak_bytes(run))
        return max(1, min(self.block_bytes // measured[self.key], self.cached))


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the peak size in bytes of the tensors that `run` creates."""
    counter = _PeakCounter()
    with counter:
        run()
    peak: int = counter.peak
    return peak


class _PeakCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current, self.peak = 0, 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        for argument in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(argument, torch.Tensor):
                self._storages.add(argument.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for output in torch.utils._pytree.tree_leaves(result):
            if isinstance(output, torch.Tensor) and output.untyped_storage() not in self._storages:
                self._count(output.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._storages.add(storage)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.current -= size

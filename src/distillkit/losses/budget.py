"""How many positions are worked on at once: as many as fit into a memory budget, by what a loss is seen to need.

Letters: N response positions, n positions of a slice, m of a block, V vocabulary.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.types import Scores

MIB = 2**20
CPU_BUDGET = 304 * MIB
"""On the CPU a larger slice makes the products with the heads little faster. Half of it does in half precision."""
CPU_BLOCK = 4 * MIB
"""A tensor of a block on the CPU: what a loss makes of it stays in the cache."""
DEVICE_SHARE = 1 / 32
"""Share of an accelerator's memory."""
LARGEST_DEVICE_BUDGET = 2048 * MIB

_measured: weakref.WeakKeyDictionary[object, dict[Hashable, int]] = weakref.WeakKeyDictionary()


def default_budget(device: torch.device) -> int:
    """Bytes that a loss may hold at once beyond its gradients, where nobody said how many."""
    if device.type != "cuda":
        return CPU_BUDGET
    return min(int(torch.cuda.get_device_properties(device).total_memory * DEVICE_SHARE), LARGEST_DEVICE_BUDGET)


class Budget:
    """Divides a budget between slices, which the heads work on, and blocks, which the loss works on.

    Args:
        owner: The loss, or whatever stands for it.
        student: The scores that it is given: their vocabulary, type and `slicing` count.
        tensors: Types of the `[n, V]` tensors that a slice needs.
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
        self.positions = max(1, (total - self.block_bytes) // (student.vocab * sum(own.itemsize for own in tensors)))

    def block(self, run: Callable[[], Any]) -> int:
        """How many positions a block has, at least 1.

        Args:
            run: Runs a block of one position on a copy; called once for a loss, and measured.
        """
        known = _measured.setdefault(self.owner, {})
        if self.key not in known:
            known[self.key] = max(1, peak_bytes(run))
        return max(1, min(self.block_bytes // known[self.key], self.cached))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors made by `run` that were alive at the same time."""
    peak = _Peak()
    with peak:
        run()
    most: int = peak.most
    return most


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._known.add(given.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage() not in self._known:
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

"""The output embedding of a language model with what its architecture does to the logits, and its gradient by hand.

Letters: n positions of a slice, D hidden width, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillkit import sums
from distillkit.hardware import native
from distillkit.types import Head


@dataclass(frozen=True)
class OutputHead:
    """The output embedding of a causal language model with what its architecture does to the logits.

    Args:
        module: Output embedding, `[n, D]` to `[n, width]`.
        vocab: V, logits past it are not computed (or cut, where the module is not a plain linear layer).
        scale: Multiplies the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Bounds the logits to ± this value by a hyperbolic tangent (Gemma 2); None for no bound.
    """

    module: nn.Module
    vocab: int
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, D]`."""
        if _is_plain(self.module):
            weight, bias = _whole(self.module.weight), _whole(self.module.bias)
            logits = nn.functional.linear(hidden, weight[: self.vocab], None if bias is None else bias[: self.vocab])
        else:
            logits = self.module(hidden)[..., : self.vocab]
        return self.shaped(logits)

    def shaped(self, logits: Tensor) -> Tensor:
        """`[n, V]` logits after scale and cap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def parameters(self) -> Iterable[Tensor]:
        """The output embedding's parameters, those of a LoRA adapter on it included."""
        return self.module.parameters()


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear layer and no more; sharding makes a subclass of it, an adapter another forward."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _whole(parameter: Any) -> Any:
    """All of a parameter that is sharded over ranks; its gradient is the mean of theirs, as sharded training has it."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # here: only sharded runs need it

    whole = parameter.full_tensor(grad_placements=[Partial() for _ in parameter.placements])
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / parameter.device_mesh.size())
    return whole


class HeadPass:
    """A head on its way over slices: logits of each, then the gradients of hidden states and parameters, summed.

    A plain linear layer is differentiated by hand: its gradient is added to in place instead of being made anew for
    each slice, and that of a head in half precision is summed with more bits than it has. Where the products run in
    another type than the weight's, the weight is cast a chunk at a time. Any other head goes through autograd.

    Args:
        head: A model's head, as in `Scores`.
        hidden: `[N, D]` the hidden states that it will be given slices of.
    """

    def __init__(self, head: Head, hidden: Tensor) -> None:
        if isinstance(head, nn.Linear) and _is_plain(head):
            head = OutputHead(head, head.out_features)
        self.head = head
        self.plain = head if isinstance(head, OutputHead) and _is_plain(head.module) else None
        self.wide = self.stored = torch.promote_types(hidden.dtype, torch.float32)
        if self.plain is None:
            self.leaves = [parameter for parameter in head.parameters() if parameter.requires_grad]
        else:
            self.weight, self.bias = _whole(self.plain.module.weight), _whole(self.plain.module.bias)
            self.leaves = [own for own in (self.weight, self.bias) if own is not None and own.requires_grad]
            kind = hidden.device.type
            self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
            if self.weight.dtype == torch.float64:
                self.dtype = torch.float64
            if self.plain.softcap is None and self.plain.scale == 1.0 and self.dtype.itemsize < self.wide.itemsize:
                self.stored = self.dtype  # as the model itself has its logits
            self.dtype = native(self.dtype, hidden.device)
        self._hidden = self._slope = hidden[:0]
        self._sums: list[sums.GradientSum] = []

    @property
    def num_tensors(self) -> int:
        """How many `[n, V]` tensors a slice of which a gradient is taken needs."""
        return 1 if self.plain is not None and self.plain.softcap is None else 2

    def logits(self, hidden: Tensor, out: Tensor, with_grad: bool = False) -> Tensor:
        """Writes the logits of hidden states `[n, D]` to `out` `[n, V]`; `with_grad` says that `backward` follows."""
        self._slope = hidden[:0]  # the last slice's is let go before this one's is made
        if self.plain is None:
            with torch.set_grad_enabled(with_grad):
                self._hidden = hidden.detach().requires_grad_(with_grad)
                self._slope = self.head(self._hidden)
            return out.copy_(self._slope.detach())
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            self._hidden = hidden.to(self.dtype)
            for rows, weight in self._chunks(out.shape[1]):
                if self.dtype == out.dtype:
                    torch.mm(self._hidden, weight.T, out=out[:, rows])
                else:
                    out[:, rows].copy_(self._hidden @ weight.T)
            if self.bias is not None:
                out.add_(self.bias[: out.shape[1]])
            if self.plain.scale != 1.0:
                out.mul_(self.plain.scale)
            if self.plain.softcap is not None:
                out.div_(self.plain.softcap).tanh_()
                if with_grad:  # the cap's derivative is 1 − tanh²
                    self._slope = out.square().neg_().add_(1.0)
                out.mul_(self.plain.softcap)
        return out

    def start(self) -> None:
        """Sets the sums of the parameters' gradients to 0."""
        self._sums = [sums.summing(own) for own in self.leaves]

    def backward(self, grad: Tensor) -> Tensor:
        """Adds to the parameters' gradients.

        Args:
            grad: `[n, V]` gradient by the last slice's logits; overwritten.

        Returns:
            `[n, D]` gradient by its hidden states.
        """
        if self.plain is None:
            leaves = (self._hidden, *self.leaves)
            found = torch.autograd.grad(self._slope, leaves, grad.to(self._slope.dtype), materialize_grads=True)
            for own, more in zip(self._sums, found[1:], strict=True):
                own.add(slice(0, len(more)), more)
            by_hidden: Tensor = found[0]
            return by_hidden
        with torch.autocast(grad.device.type, enabled=False):
            if self.plain.softcap is not None:
                grad.mul_(self._slope)
            if self.plain.scale != 1.0:
                grad.mul_(self.plain.scale)
            by_hidden = torch.zeros(self._hidden.shape, dtype=self.wide, device=grad.device)
            trained = {id(own): total for own, total in zip(self.leaves, self._sums, strict=True)}
            if self.bias is not None and id(self.bias) in trained:
                trained[id(self.bias)].add(slice(0, grad.shape[1]), grad.sum(0, dtype=self.wide))
            for rows, weight in self._chunks(grad.shape[1]):
                part = grad[:, rows].to(self.dtype)
                by_hidden += part @ weight
                if id(self.weight) in trained:
                    trained[id(self.weight)].add_product(rows, part, self._hidden)
        return by_hidden

    def finished(self) -> list[Tensor]:
        """The parameters' gradients in the parameters' own types; the sums are given up."""
        return [self._sums.pop(0).finished() for _ in self.leaves]

    def _chunks(self, vocab: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight in the type that the products run in; all at once where that is its own."""
        weight = self.weight.detach()
        exact = weight.dtype == self.dtype and weight.dtype in (torch.float32, torch.float64)
        for rows in [slice(0, vocab)] if exact else sums.cut(vocab, sums.rows_at_once(weight.device)):
            yield rows, weight[rows].to(self.dtype)

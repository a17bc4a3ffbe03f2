"""Output head: a language model's output embedding with logit scale and softcap, and its gradient in closed form.

Letters: n positions of a slice, D hidden width, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.chunked import accumulate
from distillkit.devices.precision import fast_dtype
from distillkit.types import Head


@dataclass(frozen=True)
class OutputHead:
    """Output embedding of a causal language model, with the scale and softcap that its architecture applies.

    Args:
        module: Output embedding, `[n, D]` to `[n, width]`.
        vocab: V, number of tokens to score. Logits beyond it are not computed, or cut off if the module is not a plain
            linear layer.
        scale: Factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Bound of the logits, enforced by a hyperbolic tangent (Gemma 2); None for no bound.
    """

    module: nn.Module
    vocab: int
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """Returns the logits `[n, V]` of hidden states `[n, D]`, which are narrowed to the type of the weight."""
        hidden = self.narrowed(hidden)
        if _is_plain(self.module):
            weight, bias = _full_tensor(self.module.weight), _full_tensor(self.module.bias)
            logits = nn.functional.linear(hidden, weight[: self.vocab], None if bias is None else bias[: self.vocab])
        else:
            logits = self.module(hidden)[..., : self.vocab]
        return self.shaped(logits)

    def narrowed(self, hidden: Tensor) -> Tensor:
        """Returns hidden states in the type of the weight if theirs is wider, as that of Mamba 2's float32 residual."""
        types = (parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point())
        dtype = next(types, hidden.dtype)
        return hidden.to(dtype) if dtype.itemsize < hidden.dtype.itemsize else hidden

    def shaped(self, logits: Tensor) -> Tensor:
        """Returns `[n, V]` logits after scale and softcap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def parameters(self) -> Iterable[Tensor]:
        """Returns the parameters of the output embedding, including those of a LoRA adapter on it."""
        return self.module.parameters()


def _is_plain(module: object) -> bool:
    """Returns True for a linear layer with torch's forward: sharding makes a subclass, an adapter replaces forward."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _full_tensor(parameter: Any) -> Any:
    """Gathers a parameter that is sharded over ranks. As in sharded training, its gradient is the mean over ranks."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # imported lazily: only sharded runs need it

    full = parameter.full_tensor(grad_placements=[Partial() for _ in parameter.placements])
    if full.requires_grad:
        full.register_hook(lambda grad: grad / parameter.device_mesh.size())
    return full


class HeadPass:
    """Evaluates an output head slice by slice and accumulates its gradients.

    A plain linear layer is differentiated in closed form: the gradient is accumulated in place instead of being
    allocated for each slice, and in half precision it is accumulated with extra bits. If the products run in another
    dtype than the weight's, the weight is cast a chunk at a time. Any other head goes through autograd.

    Args:
        head: A model's head, as in `Scores`.
        hidden: `[N, D]` hidden states; slices of them are passed to `logits`.
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
            self.weight, self.bias = _full_tensor(self.plain.module.weight), _full_tensor(self.plain.module.bias)
            self.leaves = [
                parameter for parameter in (self.weight, self.bias) if parameter is not None and parameter.requires_grad
            ]
            kind = hidden.device.type
            self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
            if self.weight.dtype == torch.float64:
                self.dtype = torch.float64
            if self.plain.softcap is None and self.plain.scale == 1.0 and self.dtype.itemsize < self.wide.itemsize:
                self.stored = self.dtype  # the dtype of the model's own logits
            self.dtype = fast_dtype(self.dtype, hidden.device)
        self._hidden = self._slope = hidden[:0]
        self._sums: list[accumulate.GradientAccumulator] = []

    @property
    def num_tensors(self) -> int:
        """Number of `[n, V]` tensors that a slice with a gradient needs."""
        return 1 if self.plain is not None and self.plain.softcap is None else 2

    def logits(self, hidden: Tensor, out: Tensor, with_grad: bool = False) -> Tensor:
        """Computes the logits of a slice.

        Args:
            hidden: `[n, D]` hidden states of the slice.
            out: `[n, V]` output, overwritten.
            with_grad: Whether `backward` will be called for this slice.

        Returns:
            `out`.
        """
        self._slope = hidden[:0]  # frees that of the last slice before a new one is allocated
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
                if with_grad:  # the softcap's derivative is 1 − tanh²
                    self._slope = out.square().neg_().add_(1.0)
                out.mul_(self.plain.softcap)
        return out

    def start(self) -> None:
        """Sets the accumulated gradients of the parameters to 0."""
        self._sums = [accumulate.make_accumulator(leaf) for leaf in self.leaves]

    def backward(self, grad: Tensor) -> Tensor:
        """Accumulates the gradients of the parameters for the last slice.

        Args:
            grad: `[n, V]` gradient by the logits of that slice; overwritten.

        Returns:
            `[n, D]` gradient by the hidden states of that slice.
        """
        if self.plain is None:
            leaves = (self._hidden, *self.leaves)
            by_hidden: Tensor
            by_hidden, *by_leaves = torch.autograd.grad(
                self._slope, leaves, grad.to(self._slope.dtype), materialize_grads=True
            )
            for accumulator, leaf_grad in zip(self._sums, by_leaves, strict=True):
                accumulator.add(slice(0, len(leaf_grad)), leaf_grad)
            return by_hidden
        with torch.autocast(grad.device.type, enabled=False):
            if self.plain.softcap is not None:
                grad.mul_(self._slope)
            if self.plain.scale != 1.0:
                grad.mul_(self.plain.scale)
            by_hidden = torch.zeros(self._hidden.shape, dtype=self.wide, device=grad.device)
            trained = {id(leaf): accumulator for leaf, accumulator in zip(self.leaves, self._sums, strict=True)}
            if self.bias is not None and id(self.bias) in trained:
                trained[id(self.bias)].add(slice(0, grad.shape[1]), grad.sum(0, dtype=self.wide))
            for rows, weight in self._chunks(grad.shape[1]):
                part = grad[:, rows].to(self.dtype)
                by_hidden += part @ weight
                if id(self.weight) in trained:
                    trained[id(self.weight)].add_product(rows, part, self._hidden)
        return by_hidden

    def finished(self) -> list[Tensor]:
        """Returns the gradients in the dtypes of the parameters and frees the accumulators."""
        return [self._sums.pop(0).finished() for _ in self.leaves]

    def _chunks(self, vocab: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields rows of the weight, cast to the dtype of the products; all rows together if no cast is needed."""
        weight = self.weight.detach()
        exact = weight.dtype == self.dtype and weight.dtype in (torch.float32, torch.float64)
        for rows in [slice(0, vocab)] if exact else accumulate.cut(vocab, accumulate.rows_at_once(weight.device)):
            yield rows, weight[rows].to(self.dtype)

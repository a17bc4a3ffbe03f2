"""The template of losses that compare the two distributions at each position."""

from abc import abstractmethod

import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.interfaces import Loss
from distillkit.losses.slicing import Sliced
from distillkit.types import Batch, LossOutput, Reduction, Scores


class TokenLoss(Loss):
    """A loss that is a divergence at each response position. A subclass writes `divergence` and nothing else.

    A subclass that knows its gradient in closed form may write `gradient` too, for speed.

    The base class slices, frees and accumulates, so that memory does not grow with N·V, and weighs the positions:
    `sequence_mean` is the mean over a response's positions, then over responses; `token_mean` the mean over positions.
    Either is the mean over the global batch.

    Args:
        reduction: How positions are weighed.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ², which keeps the gradient's scale.

    Raises:
        ConfigError: If a value is outside its range.
    """

    def __init__(self, reduction: Reduction = "sequence_mean", temperature: float = 1.0, rescale: bool = False) -> None:
        super().__init__()
        self.reduction = checked_reduction(type(self).__name__, reduction)
        if not temperature > 0:
            raise ConfigError(f"{type(self).__name__}.temperature must be above 0, got {temperature}.")
        self.temperature = temperature
        self.scale = temperature**2 if rescale else 1.0

    @abstractmethod
    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The divergence at each position of a slice.

        Args:
            logp: `[n, V]` teacher log-probabilities, float32, without gradient.
            logq: `[n, V]` student log-probabilities, float32.

        Returns:
            `[n]` nats, 0 where p = q.
        """

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence and its gradient in closed form. Optional: without it autograd finds the gradient.

        Args:
            logp: `[n, V]` teacher log-probabilities, float32; may be overwritten.
            logq: `[n, V]` student log-probabilities, float32; may be overwritten.

        Returns:
            `[n]` nats, and `[n, V]` the gradient of each by the student's logits z, where log q = log softmax z; see
            `distillkit.gradients`.
        """
        raise NotImplementedError

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Σ weight · divergence over the batch's positions."""

        def values(logp: Tensor, logq: Tensor) -> Tensor:
            return self.divergence(logp, logq) * self.scale

        def gradient(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
            found, grad = self.gradient(logp, logq)
            return found * self.scale, grad if self.scale == 1.0 else grad.mul_(self.scale)

        assert teacher is not None, "a TokenLoss needs a teacher"
        closed_form = gradient if self._has_gradient() else None
        sliced = Sliced(self, student, teacher, values, closed_form, temperature=self.temperature)
        total, (found,) = sliced.sum(position_weights(batch, self.reduction))
        return LossOutput(total, self.units(batch).to(total.device), {"divergence": found})

    def _has_gradient(self) -> bool:
        """Whether the class that wrote the divergence in use wrote its gradient as well."""
        owner = next(own for own in type(self).__mro__ if {"divergence", "gradient"} & vars(own).keys())
        return "gradient" in vars(owner) and owner is not TokenLoss

    def units(self, batch: Batch) -> Tensor:
        """Number of responses or of positions, as `reduction` says."""
        return count_units(batch.lengths, self.reduction)


def checked_reduction(name: str, reduction: Reduction) -> Reduction:
    """`reduction`, or a ConfigError that names `name`."""
    if reduction not in ("sequence_mean", "token_mean"):
        raise ConfigError(f"{name}.reduction must be sequence_mean or token_mean, got {reduction!r}.")
    return reduction


def checked_share(name: str, value: float, upper_closed: bool = False) -> float:
    """`value` if it lies in [0, 1) (or [0, 1]), or a ConfigError that names the setting `name`."""
    if not (0 <= value < 1 or (upper_closed and value == 1)):
        raise ConfigError(f"{name} must lie in [0, 1{']' if upper_closed else ')'}, got {value}.")
    return value


def side_of(writer: str) -> str:
    """The side of a contrastive loss that a response is on.

    Returns:
        `student` for the student's own, which it is pushed down on; `teacher` for all others, which it is pulled up on:
        the teacher's, a draft of the student's that the teacher corrected, a stronger model's, the data's.
    """
    return "student" if writer == "student" else "teacher"


def count_units(lengths: tuple[int, ...], reduction: Reduction) -> Tensor:
    """Units of rows with `lengths` positions each, `[]` float64: rows that have a position, or positions."""
    count = sum(lengths) if reduction == "token_mean" else sum(length > 0 for length in lengths)
    return torch.tensor(float(count), dtype=torch.float64)


def position_weights(batch: Batch, reduction: Reduction) -> Tensor:
    """`[N]` weight of each position, float64 on the CPU and float32 elsewhere: 1, or 1 over its row's positions."""
    dtype = torch.float64 if batch.rows.device.type == "cpu" else torch.float32
    if reduction == "token_mean":
        return torch.ones(batch.rows.shape, dtype=dtype, device=batch.rows.device)
    lengths = torch.tensor(batch.lengths, dtype=dtype).to(batch.rows.device, non_blocking=True)
    return lengths.reciprocal()[batch.rows]  # a row without positions has no entry in `rows`

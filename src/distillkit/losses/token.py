"""Template for losses that compare the two distributions at each position."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from distillkit.chunked.evaluate import chunked_sum
from distillkit.errors import ConfigError, PluginError, check_range
from distillkit.interfaces import Loss
from distillkit.types import Batch, LossOutput, Reduction, Scores


class TokenLoss(Loss):
    """A divergence at each response position. A subclass has to define only `divergence`.

    For speed, a subclass may also define `gradient`, the gradient in closed form. To have more logged than the loss, it
    defines `metrics`.

    The base class evaluates the divergence a slice of positions at a time, so that memory does not grow with N·V, and
    weighs the positions: `sequence_mean` is the mean over the positions of a response, then over responses;
    `token_mean` is the mean over positions. Both are means over the global batch.

    Args:
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ², so that the gradient keeps its scale.

    Raises:
        ConfigError: If a value is outside its range.
    """

    has_closed_form: ClassVar[bool] = False
    """True if the class that defines the divergence in use, or a subclass of it, also defines `gradient`."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass that overrides only `divergence` must not use the gradient of its parent.
        definer = next(base for base in cls.__mro__ if {"divergence", "gradient"} & vars(base).keys())
        cls.has_closed_form = definer is not TokenLoss and "gradient" in vars(definer)

    def __init__(self, reduction: Reduction = "sequence_mean", temperature: float = 1.0, rescale: bool = False) -> None:
        super().__init__()
        self.reduction = checked_reduction(type(self).__name__, reduction)
        check_range(f"{type(self).__name__}.temperature", temperature, 0, closed="neither")
        self.temperature = temperature
        self.scale = temperature**2 if rescale else 1.0

    @abstractmethod
    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns the divergence at each position of a slice.

        Args:
            logp: `[n, V]` teacher log-probabilities, float32, without gradient; they may be −∞, and p·log p is then NaN
                unless it is written as `p * logp.clamp_min(-1e4)`, for example.
            logq: `[n, V]` student log-probabilities, float32; they may be −∞ too.

        Returns:
            `[n]` nats, 0 where p = q.
        """

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the divergence and its gradient in closed form. Optional: the default is autograd.

        Args:
            logp: `[n, V]` teacher log-probabilities, float32; may be overwritten.
            logq: `[n, V]` student log-probabilities, float32; may be overwritten.

        Returns:
            `[n]` nats, and `[n, V]` the gradient of each by the student's logits z, where log q = log softmax z; see
            `distillkit.divergences`.
        """
        raise NotImplementedError

    def metrics(self, logp: Tensor, logq: Tensor) -> Mapping[str, Tensor]:
        """Returns what is logged besides the loss. Optional: the default is nothing.

        `entropy` is logged as `train/entropy`: the mean over the response positions of the global batch, of all
        micro-batches and ranks.

        Args:
            logp: `[n, V]` teacher log-probabilities of a slice, float32; they may be −∞.
            logq: `[n, V]` student log-probabilities, float32, without gradient; they may be −∞ too.

        Returns:
            `[n]` values by name. The names must be the same for every slice, one without positions included.
        """
        return {}

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Returns Σ weight · divergence over the batch's positions."""
        assert teacher is not None, "a TokenLoss needs a teacher"
        weights = position_weights(batch, self.reduction)
        empty = weights.new_zeros((0, student.vocab if teacher.top_k_ids is None else teacher.vocab))
        names = self._checked_metrics(empty, empty)
        table = torch.zeros((len(weights), len(names)), device=weights.device)  # [N, M], filled by `values`
        columns = (table,) if names else ()
        total, values = chunked_sum(self, student, teacher, weights, columns, self.temperature)
        metrics = {"divergence": values, **dict(zip(names, table.unbind(-1), strict=True))}
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), metrics)

    def _checked_metrics(self, logp: Tensor, logq: Tensor) -> Mapping[str, Tensor]:
        """Returns the metrics of a slice.

        Raises:
            PluginError: If one has not one value per position, or the name of another metric.
        """
        metrics = self.metrics(logp, logq)
        for name, values in metrics.items():
            shape = list(values.shape) if isinstance(values, Tensor) else []  # a number is one value for all
            if shape != [len(logq)]:
                raise PluginError(
                    f"{type(self).__name__}.metrics must return one value per position, `[n]`: {name!r} has the shape "
                    f"{shape} for {len(logq)} positions of {logq.shape[-1]} tokens. Reduce the last "
                    "dimension alone."
                )
            if name in ("loss", "divergence"):
                raise PluginError(
                    f"{type(self).__name__}.metrics can't have the name {name!r}: the loss itself has it."
                )
        return metrics

    @torch.no_grad()
    def _fill(self, table: Tensor, logp: Tensor, logq: Tensor) -> None:
        """Writes the metrics of some positions into their rows `[m, M]` of the table."""
        for column, values in enumerate(self._checked_metrics(logp, logq).values()):
            table[:, column] = values

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        """Returns the divergence at each position, rescaled; see `PositionLoss`."""
        assert teacher_logp is not None
        for table in columns:
            self._fill(table, teacher_logp, student_logp.detach())
        return self.divergence(teacher_logp, student_logp) * self.scale

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the divergence at each position and its gradient, rescaled; see `PositionLoss`."""
        assert teacher_logp is not None
        for table in columns:  # first: the gradient may overwrite the log-probabilities
            self._fill(table, teacher_logp, student_logp)
        values, grad = self.gradient(teacher_logp, student_logp)
        return values * self.scale, grad if self.scale == 1.0 else grad.mul_(self.scale)

    def units(self, batch: Batch) -> Tensor:
        """Returns the number of responses or positions, depending on `reduction`."""
        return count_units(batch.lengths, self.reduction)


def checked_reduction(name: str, reduction: Reduction) -> Reduction:
    """Returns `reduction` if it is valid, else raises a ConfigError for the loss `name`."""
    if reduction not in ("sequence_mean", "token_mean"):
        raise ConfigError(f"{name}.reduction must be sequence_mean or token_mean, got {reduction!r}.")
    return reduction


def checked_share(name: str, value: float, upper_closed: bool = False) -> float:
    """Returns `value` if it lies in [0, 1) (or [0, 1]), else raises a ConfigError for the setting `name`."""
    check_range(name, value, 0, 1, closed="both" if upper_closed else "left")
    return value


REJECTED = "rejected"
"""Writer of the worse response of a pair of the data."""


def side_of(writer: str) -> str:
    """Returns the side of a contrastive loss that a response belongs to.

    Returns:
        `student` for the student's responses and the worse ones of pairs of the data, whose likelihood the loss pushes
        down. `teacher` for all other responses, whose likelihood it pulls up: those of the teacher, the student's
        drafts that the teacher corrected, those of a stronger model, and those of the data set.
    """
    return "student" if writer in ("student", REJECTED) else "teacher"


def count_units(lengths: tuple[int, ...], reduction: Reduction) -> Tensor:
    """Returns the units of rows with `lengths` positions, `[]` float64: rows with a position, or positions."""
    count = sum(lengths) if reduction == "token_mean" else sum(length > 0 for length in lengths)
    return torch.tensor(float(count), dtype=torch.float64)


def position_weights(batch: Batch, reduction: Reduction) -> Tensor:
    """Returns the `[N]` weights of the positions: 1, or 1 / the length of the row. Float64 on the CPU, else float32."""
    dtype = torch.float64 if batch.rows.device.type == "cpu" else torch.float32
    if reduction == "token_mean":
        return torch.ones(batch.rows.shape, dtype=dtype, device=batch.rows.device)
    lengths = torch.tensor(batch.lengths, dtype=dtype).to(batch.rows.device, non_blocking=True)
    return lengths.reciprocal()[batch.rows]  # a row without positions has no entry in `rows`

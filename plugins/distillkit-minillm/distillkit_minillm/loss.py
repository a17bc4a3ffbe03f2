"""The loss of MiniLLM: a policy gradient of the reverse KL."""

import torch
from torch import Tensor

from distillkit import divergences
from distillkit.chunked import PositionLoss, chunked_sum, target_log_probs
from distillkit.errors import check_range
from distillkit.interfaces import Loss
from distillkit.types import Batch, LossOutput, Scores


class _ReverseKL(PositionLoss):
    """KL(q‖p) at each position, the single-step term."""

    has_closed_form = True

    def values(self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor) -> Tensor:
        assert teacher_logp is not None
        return divergences.rkl(teacher_logp, student_logp)

    def values_and_grad(
        self, teacher_logp: Tensor | None, student_logp: Tensor, *columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert teacher_logp is not None
        return divergences.rkl_and_grad(teacher_logp, student_logp)


_REVERSE_KL = _ReverseKL()


class MiniLLM(Loss):
    """The gradient of the reverse KL of whole responses, on responses sampled from a mixture of teacher and student.

    At position t of a response, with w_t = q(y_t) / (α·p(y_t) + (1−α)·q(y_t)) detached:

    - the single-step term w_t·KL(q_t‖p_t), summed over the vocabulary;
    - the long term −w_t·R_{t+1}·∇ log q(y_t), with R_{t+1} = Σ_{u>t} log p(y_u)/q(y_u) / (T−t) detached, the mean over
      the following tokens, so that short responses are not preferred;
    - on rows of the data −log q(y_t), weighted by `language_model`.

    Each is a mean over its own positions. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equations 2 to 8.

    Args:
        teacher_share: α in [0, 1), the teacher's share of the mixture that the responses were sampled from.
        language_model: Weight of the language-model term, at least 0.

    Raises:
        ConfigError: If a value is outside its range.
    """

    def __init__(self, teacher_share: float = 0.2, language_model: float = 1.0) -> None:
        super().__init__()
        check_range("MiniLLM.language_model", language_model, 0)
        check_range("MiniLLM.teacher_share", teacher_share, 0, 1, closed="left")
        self.teacher_share, self.language_model = teacher_share, language_model

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Totals of the policy gradient and of the language-model term, `[2]`; the long term has the value 0."""
        assert teacher is not None, "MiniLLM needs a teacher"
        logq = target_log_probs(student, batch.targets)
        with torch.no_grad():
            p, q = target_log_probs(teacher, batch.targets, student.slicing), logq.detach()
            of_data = torch.tensor([writer == "dataset" for writer in batch.writer], device=batch.rows.device)
            of_data = of_data[batch.rows]  # [N]
            mixture = (self.teacher_share * (p - q).exp() + 1.0 - self.teacher_share).reciprocal()
            weights = mixture.masked_fill(of_data, 0.0)
            returns = _following_means(p - q, batch)
        single, _ = chunked_sum(_REVERSE_KL, student, teacher, weights)
        long = -(weights * returns * (logq - q)).sum()  # its value is 0
        likelihood = -(logq * of_data).sum()
        metrics = {
            "importance": mixture[~of_data],
            "return": returns[~of_data],
            "sampled_reverse_kl": (q - p)[~of_data],
            "language_model": -q[of_data],
        }
        total = torch.stack([single + long.to(single), self.language_model * likelihood.to(single)])
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Number of positions in sampled responses and in those of the data, `[2]`."""
        responses = zip(batch.lengths, batch.writer, strict=True)
        of_data = sum(length for length, writer in responses if writer == "dataset")
        return torch.tensor([batch.num_tokens - of_data, of_data], dtype=torch.float64)


def _following_means(rewards: Tensor, batch: Batch) -> Tensor:
    """`[N]` mean reward of the following positions in the same row; 0 for a row's last position."""
    lengths = torch.tensor(batch.lengths, device=rewards.device)
    ends = lengths.cumsum(0)[batch.rows]  # [N] index just after each position's row
    sums = torch.cat([rewards.new_zeros(1), rewards.cumsum(0)])
    index = torch.arange(len(rewards), device=rewards.device)
    following = ends - index - 1
    return (sums[ends] - sums[index + 1]) / following.clamp_min(1)

"""The policy gradient of MiniLLM."""

import torch
from torch import Tensor

from distillkit import divergences, gradients
from distillkit.errors import ConfigError
from distillkit.interfaces import Loss
from distillkit.losses.likelihood import target_log_probs
from distillkit.losses.slicing import Sliced
from distillkit.losses.token import checked_share
from distillkit.types import Batch, LossOutput, Scores


class MiniLLM(Loss):
    """The gradient of the reverse KL of whole responses, on responses drawn from a mixture of teacher and student.

    At position t of a response, with w_t = q(y_t) / (α·p(y_t) + (1−α)·q(y_t)) held:

    - the single-step term w_t·KL(q_t‖p_t), summed over the vocabulary;
    - the long term −w_t·R_{t+1}·∇ log q(y_t), with R_{t+1} = Σ_{u>t} log p(y_u)/q(y_u) / (T−t) held, the mean over the
      tokens that follow, so that short responses are not preferred;
    - on the rows of the data −log q(y_t), weighed by `language_model`.

    Each is a mean over its own positions. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equations 2 to 8.

    Args:
        teacher_share: α in [0, 1), that of the mixture that the responses were drawn from.
        language_model: Weight of the last term, at least 0.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, teacher_share: float = 0.2, language_model: float = 1.0) -> None:
        super().__init__()
        if not language_model >= 0:
            raise ConfigError(f"MiniLLM.language_model must be at least 0, got {language_model}.")
        self.teacher_share = checked_share("MiniLLM.teacher_share", teacher_share)
        self.language_model = language_model

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """The policy gradient's and the language model's totals, `[2]`; the long term has the value 0."""
        assert teacher is not None, "MiniLLM needs a teacher"
        logq = target_log_probs(student, batch.targets)
        with torch.no_grad():
            p, q = target_log_probs(teacher, batch.targets, student.slicing), logq.detach()
            of_data = torch.tensor([writer == "dataset" for writer in batch.writer], device=batch.rows.device)
            of_data = of_data[batch.rows]  # [N]
            mixture = (self.teacher_share * (p - q).exp() + 1.0 - self.teacher_share).reciprocal()
            weights = mixture.masked_fill(of_data, 0.0)
            returns = _following_means(p - q, batch)
        single, *_ = Sliced(
            self, student, teacher, lambda logp, logq: divergences.kl(logq, logp), gradients.rkl
        ).sum(weights)  # fmt: skip
        long = -(weights * returns * (logq - q)).sum()  # its value is 0
        likelihood = -(logq * of_data).sum()
        metrics = {
            "importance": mixture[~of_data], "return": returns[~of_data], "sampled_reverse_kl": (q - p)[~of_data],
            "language_model": -q[of_data],
        }  # fmt: skip
        total = torch.stack([single + long.to(single), self.language_model * likelihood.to(single)])
        return LossOutput(total, self.units(batch).to(total.device), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Positions of the drawn responses and of the data's, `[2]`."""
        sides = zip(batch.lengths, batch.writer, strict=True)
        of_data = sum(length for length, writer in sides if writer == "dataset")
        return torch.tensor([batch.num_tokens - of_data, of_data], dtype=torch.float64)


def _following_means(rewards: Tensor, batch: Batch) -> Tensor:
    """`[N]` mean of the rewards of the positions that follow in the same row; 0 for a row's last position."""
    lengths = torch.tensor(batch.lengths, device=rewards.device)
    ends = lengths.cumsum(0)[batch.rows]  # [N] the place behind each position's row
    sums = torch.cat([rewards.new_zeros(1), rewards.cumsum(0)])
    places = torch.arange(len(rewards), device=rewards.device)
    following = ends - places - 1
    return (sums[ends] - sums[places + 1]) / following.clamp_min(1)

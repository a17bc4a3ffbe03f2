"""Direct preference knowledge distillation."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from distillkit.chunked.likelihood import row_means, target_log_probs
from distillkit.errors import DataError, check_range
from distillkit.interfaces import Loss
from distillkit.losses.token import side_of
from distillkit.types import Batch, LossOutput, Scores


class DPKD(Loss):
    """Prefers the teacher's response of a pair to the student's, with the teacher as the reference.

    −log σ(β·[(log q(y_t) − log q(y_s)) − (log p(y_t) − log p(y_s))]), where log q(y) is the mean of
    the student's log-probabilities of the response's tokens, and p is the teacher. A unit is a pair.

    Li et al. 2024, arXiv 2406.19774.

    Args:
        beta: β > 0, sharpness of the preference.

    Raises:
        ConfigError: If `beta` is not above 0.
    """

    contrasts_sides = True

    def __init__(self, beta: float = 0.2) -> None:
        super().__init__()
        check_range("DPKD.beta", beta, 0, closed="neither")
        self.beta = beta

    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Returns the sum over the batch's pairs."""
        assert teacher is not None, "DPKD needs a teacher"
        chosen, rejected = _pairs(batch)
        logq = row_means(target_log_probs(student, batch.targets), batch)
        with torch.no_grad():
            logp = row_means(target_log_probs(teacher, batch.targets, student.slicing), batch)
        margin = (logq[chosen] - logq[rejected]) - (logp[chosen] - logp[rejected])
        metrics = {
            "margin": margin.detach(),
            "student_logp_teacher_response": logq[chosen].detach(),
            "student_logp_student_response": logq[rejected].detach(),
        }
        # Without any pair there is a graph too: the sum of an empty selection is 0 with a gradient of 0.
        total = -logsigmoid(self.beta * margin).sum()
        return LossOutput(total, self.units(batch).to(total.device, non_blocking=True), metrics)

    def units(self, batch: Batch) -> Tensor:
        """Returns the number of pairs."""
        return torch.tensor(float(len(_pairs(batch)[0])), dtype=torch.float64)


def _pairs(batch: Batch) -> tuple[list[int], list[int]]:
    """Returns the rows of the teacher's and of the student's responses, pair by pair; see `side_of`."""
    sides = [(pair, side_of(writer)) for pair, writer in zip(batch.pair, batch.writer, strict=True)]
    rows = {side: row for row, side in enumerate(sides)}
    pairs = sorted(set(batch.pair))
    missing = [pair for pair in pairs for writer in ("teacher", "student") if (pair, writer) not in rows]
    if missing:
        raise DataError(
            "DPKD needs a teacher's and a student's response for each prompt, "
            f"got {sorted(set(batch.writer))}: use PairedCurator, or DataPairs for preference data."
        )
    used = [pair for pair in pairs if all(batch.lengths[rows[pair, writer]] for writer in ("teacher", "student"))]
    return [rows[pair, "teacher"] for pair in used], [rows[pair, "student"] for pair in used]

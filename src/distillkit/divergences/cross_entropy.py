"""Cross-entropy with its gradient.

Letters: N positions, V vocabulary.
"""

from torch import Tensor

from distillkit.divergences.numerics import ValueAndGrad


def cross_entropy_and_grad(logq: Tensor, targets: Tensor) -> ValueAndGrad:
    """Cross-entropy −log q(y): the gradient is q, minus 1 at the token y.

    Args:
        logq: `[n, V]` student log-probabilities; overwritten.
        targets: `[n]` token ids.

    Returns:
        `[n]` nats and `[n, V]`.
    """
    values = -logq.gather(-1, targets[:, None]).squeeze(-1)
    grad = logq.exp_()
    return values, grad.scatter_add_(-1, targets[:, None], grad.new_full((1, 1), -1.0).expand(len(targets), 1))

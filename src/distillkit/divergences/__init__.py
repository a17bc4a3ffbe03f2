"""Divergences between two next-token distributions: pure functions `[N, V], [N, V] -> [N]`.

Each function takes the log-probabilities of the teacher (`logp`) and of the student (`logq`) and returns nats. None
returns NaN where a token has probability 0 in both distributions (log-probability -inf, or a finite one whose
exponential underflows): 0·log 0 = 0. Where the definition is infinite (one distribution has mass on a token that the
other excludes with -inf), the result is infinite too.

Each function has a closed form beside it, `…_and_grad`: `[n, V], [n, V] -> [n], [n, V]`, the value and its gradient
with respect to the student's logits z (log q = log softmax z). It needs no graph, uses three or four `[n, V]` tensors
instead of a dozen, and overwrites its arguments. For a divergence f with h = ∂f/∂log q, the gradient is h − q·Σh; each
docstring states it in simplified form.

Letters: N positions, n positions of a slice, V vocabulary.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

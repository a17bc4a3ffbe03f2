"""Contract tests of losses: `check_loss` for a single one, `LossContract` for pytest.

Letters: B rows, T tokens, V vocabulary, D hidden width, N response positions.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from distillkit.data.collate import collate
from distillkit.interfaces import Loss
from distillkit.losses.token import TokenLoss
from distillkit.testing.batches import make_rows
from distillkit.testing.contract import broken, run_tests
from distillkit.training.schedule_checks import unlogged_schedules
from distillkit.types import Batch, LossOutput, Row, Scores, Slicing

VOCAB = 9
# The last tokens are never targets: some tests exclude them, and a loss may use a target's log-probability.
TARGETS = VOCAB - 3
NUM_PROMPTS = 4
LENGTHS = (3, 1, 0, 2, 4, 1, 2, 3)


def check_loss(loss: Loss, exact_gradient: bool = True, writers: Sequence[str] = ("teacher", "student")) -> None:
    """Runs all tests of `LossContract`, or of `TokenLossContract` for a `TokenLoss`.

    Args:
        loss: The loss; it is copied, not changed.
        exact_gradient: Whether the gradient is that of the value; False for a loss that detaches part of it on purpose.
        writers: Writers of the rows of each prompt.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract = TokenLossContract() if isinstance(loss, TokenLoss) else LossContract()
    contract.exact_gradient, contract.writers = exact_gradient, tuple(writers)  # type: ignore[misc]
    run_tests(contract, lambda: loss)


class LossContract:
    """The contract of every `Loss` as tests. Subclass it as `Test…` and implement `make`; pytest does the rest.

    Example:
        ::

            class TestMyLoss(TokenLossContract):
                def make(self) -> Loss:
                    return MyLoss(weight=0.5)
    """

    exact_gradient: ClassVar[bool] = True
    """False for a loss that detaches part of its gradient on purpose."""

    writers: ClassVar[tuple[str, ...]] = ("teacher", "student")
    """Writers of the rows of each prompt."""

    def make(self) -> Loss:
        """The loss under test."""
        raise NotImplementedError("write make(): it returns the loss under test")

    def rows(self, lengths: Sequence[int] = LENGTHS, prompt_seed: int = 0) -> list[Row]:
        """Rows of four prompts, one per prompt and writer, some without a response position.

        Args:
            lengths: Response positions of the rows, repeated as needed.
            prompt_seed: Seed of the prompts and their lengths.
        """
        num_rows = NUM_PROMPTS * len(self.writers)
        lengths = [lengths[row % len(lengths)] for row in range(num_rows)]
        pairs = [row // len(self.writers) for row in range(num_rows)]
        return make_rows(lengths, self.writers * NUM_PROMPTS, pairs, TARGETS, prompt_seed=prompt_seed)

    def test_units_are_known_without_a_model(self) -> None:
        """`units(batch)` equals the units of `forward`: float64 on the CPU, one value per component."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        units, output = loss.units(batch), _compare(loss, *_logits(batch), batch)[0]
        kind = (units.dtype, units.device.type)
        _require(kind == (torch.float64, "cpu"), loss, f"units must be float64 on the CPU, got {kind}")
        _require(torch.equal(units, output.units.cpu()), loss, "units(batch) must equal the units that forward returns")
        _require(
            units.shape == output.total.shape and units.dim() <= 1,
            loss,
            f"total and units must both be [] or [C], got {list(output.total.shape)} and {list(units.shape)}",
        )

    def test_sums_over_units_instead_of_taking_a_mean(self) -> None:
        """Total and units of a batch are the sums over its two halves."""
        loss, rows = self._loss(), self.rows()
        batch, half = collate(rows, pad_id=0), len(rows) // 2
        student, teacher = _logits(batch)
        parts, start = [], 0
        for part in (collate(rows[:half], pad_id=0), collate(rows[half:], pad_id=0)):
            positions = slice(start, start := start + part.num_tokens)
            parts.append(_compare(loss, student[positions], teacher[positions], part)[0])
        full = _compare(loss, student, teacher, batch)[0]
        promise = "a batch must give the sum of its halves: return a sum and a count, never a mean"
        _require(_close(parts[0].total + parts[1].total, full.total), loss, promise)
        _require(torch.equal(parts[0].units + parts[1].units, full.units), loss, f"{promise} (units)")

    def test_ignores_positions_outside_of_responses(self) -> None:
        """Other prompts, prompt lengths and padding change nothing."""
        loss = self._loss()
        batch, variant = (collate(self.rows(prompt_seed=seed), pad_id=pad) for seed, pad in ((0, 0), (2, 5)))
        assert torch.equal(batch.targets, variant.targets)
        assert batch.input_ids.shape != variant.input_ids.shape
        outputs, grads = zip(*(_compare(loss, *_logits(each), each) for each in (batch, variant)), strict=True)
        same = _close(outputs[0].total, outputs[1].total) and _close(*grads)
        _require(same, loss, "prompts and padding must not change the loss")

    def test_has_a_gradient_when_no_position_is_selected(self) -> None:
        """Without response positions the total is 0 and has a graph, and every parameter has a gradient of 0."""
        loss, batch = self._loss(), collate(self.rows(lengths=(0,)), pad_id=0)
        student, teacher = _model(batch, seed=1), _model(batch, seed=2)
        output = loss(student, teacher if loss.needs_teacher else None, batch)
        _require(
            bool((output.total == 0).all()), loss, f"without response positions the total must be 0, got {output.total}"
        )
        _require_graph(loss, output)
        output.total.sum().backward()
        zero = all(weight.grad is not None and not weight.grad.any() for weight in student.head.parameters())
        _require(zero, loss, "without response positions the gradient of each parameter must be 0, not missing or NaN")

    def test_is_finite_on_extreme_logits(self) -> None:
        """Logits of ±1e4, −130 and −inf in both models give a finite value and gradient."""
        batch = collate(self.rows(), pad_id=0)
        student, teacher = (logits.float() for logits in _logits(batch))
        student[0::2, 0], teacher[1::3, 1], student[2::3, 2], teacher[0::4, 0] = 1e4, 1e4, -1e4, -1e4
        for logits in (student, teacher):
            logits[:, -3], logits[1::2, -2], logits[:, -1] = -130.0, -1e4, -torch.inf
        loss = copy.deepcopy(self.make()).float()
        for dtype in (torch.float32, torch.bfloat16):
            output, grad = _compare(loss, student.to(dtype), teacher.to(dtype), batch)
            _require(bool(output.total.isfinite().all()), loss, f"extreme logits give {output.total} in {dtype}")
            _require(bool(grad.isfinite().all()), loss, f"extreme logits give a gradient that is not finite in {dtype}")

    def test_gradient_matches_the_value(self) -> None:
        """The gradient with respect to the student's logits matches finite differences, in float64."""
        if not self.exact_gradient:
            return
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        student, teacher = _logits(batch)
        teacher_scores = Scores.from_logits(teacher) if loss.needs_teacher else None

        def total(logits: Tensor) -> Tensor:
            value: Tensor = loss(Scores.from_logits(logits), teacher_scores, batch).total
            return value

        matches = torch.autograd.gradcheck(total, student.requires_grad_(), raise_exception=False)
        _require(matches, loss, "the gradient must match the value (exact_gradient = False: it differs on purpose)")

    def test_does_not_depend_on_the_slice_size(self) -> None:
        """Values, metrics and the gradient of a tied head are the same for every slice size."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        full, full_grad = _compare_models(loss, batch)
        for num_positions in (1, 3, batch.num_tokens - 1):
            part, grad = _compare_models(loss, batch, Slicing(max_positions=num_positions))
            promise = f"slices of {num_positions} positions must not change the"
            _require(_close(part.total, full.total), loss, f"{promise} total")
            _require(_close(grad, full_grad), loss, f"{promise} gradient")
            same = all(_close(part.metrics[name], metric) for name, metric in full.metrics.items())
            _require(same, loss, f"{promise} metrics")

    def test_metrics_are_detached_scalars_or_vectors(self) -> None:
        """A metric has no graph and at most one dimension."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        for name, value in _compare(loss, *_logits(batch), batch)[0].metrics.items():
            _require(not value.requires_grad, loss, f"the metric {name} must be detached")
            _require(value.dim() <= 1, loss, f"the metric {name} must be a scalar or a vector, got {list(value.shape)}")

    def test_metric_names_do_not_depend_on_the_batch(self) -> None:
        """All ranks report the same metrics, even a rank whose batch has no response positions."""
        loss, names = self._loss(), []
        for lengths in (LENGTHS, (1,), (0,)):
            batch = collate(self.rows(lengths), pad_id=0)
            names.append(tuple(_compare(loss, *_logits(batch), batch)[0].metrics))
        _require(len(set(names)) == 1, loss, f"the metrics' names must not depend on the batch, got {names}")

    def test_each_schedule_has_a_name_in_the_log(self) -> None:
        """`schedules` returns every schedule within the loss."""
        loss = self.make()
        missing = unlogged_schedules(loss)
        _require(not missing, loss, f"schedules() must name each schedule for the log, it leaves out {missing}")

    def _loss(self) -> Loss:
        """The loss in float64; schedules keep their precision."""
        return copy.deepcopy(self.make()).double()


class TokenLossContract(LossContract):
    """The further contract of every `TokenLoss`, as tests: its values are those of a divergence."""

    def make(self) -> TokenLoss:
        """The loss under test."""
        raise NotImplementedError("write make(): it returns the loss under test")

    def _loss(self) -> TokenLoss:
        return copy.deepcopy(self.make()).double()

    def test_is_zero_when_student_equals_teacher(self) -> None:
        """The divergence is 0 at p = q: for plain and peaked distributions, and with excluded tokens."""
        loss = self.make()
        for logp, _ in _log_prob_pairs():
            value = loss.divergence(logp, logp.clone())
            _require(value.shape == logp.shape[:1], loss, f"divergence must return [n], got {list(value.shape)}")
            _require(_close(value, torch.zeros_like(value)), loss, f"it must be 0 at p = q, got {value}")

    def test_is_never_negative(self) -> None:
        """No position has a negative divergence, however near p and q are."""
        loss = self.make()
        for logp, logq in _log_prob_pairs():
            lowest = loss.divergence(logp, logq).min()
            _require(bool(lowest >= -1e-12), loss, f"it must not be negative, got {lowest}")

    def test_does_not_depend_on_the_order_of_the_vocabulary(self) -> None:
        """A permutation of the vocabulary permutes the gradient and does not change the value."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        student, teacher = _logits(batch)
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
        output, grad = _compare(loss, student, teacher, batch)
        permuted, permuted_grad = _compare(loss, student[:, order], teacher[:, order], batch)
        same = _close(output.total, permuted.total) and _close(grad[:, order], permuted_grad)
        _require(same, loss, "a permutation of the vocabulary must not change the loss")

    def test_top_k_scores_of_all_but_one_token_are_exact(self) -> None:
        """With K = V − 1 stored tokens the tail is a single token: value and gradient are exact."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        if loss.temperature != 1.0:  # a tail of several tokens can't be rescaled to another temperature
            return
        student, teacher = _logits(batch)
        logp = teacher.log_softmax(-1)
        order = logp.argsort(-1, descending=True)
        top_k = Scores.from_top_k(logp.gather(-1, order), order[:, :-1], logp.gather(-1, batch.targets[:, None])[:, 0])
        full, grad = _compare(loss, student, teacher, batch)
        leaf = student.clone().requires_grad_()
        output = loss(Scores.from_logits(leaf), top_k, batch)
        same = _close(output.total, full.total) and _close(torch.autograd.grad(output.total.sum(), leaf)[0], grad)
        _require(same, loss, "the top K = V − 1 tokens and the tail must give the same as the full distribution")

    def test_closed_form_gradient_matches_the_divergence(self) -> None:
        """`gradient`, if implemented, returns `divergence` and its gradient with respect to the student's logits."""
        loss, batch = self._loss(), collate(self.rows(), pad_id=0)
        if not loss.has_closed_form:
            return
        student, teacher = _logits(batch)
        for scale in (1.0, 8.0):
            logp, logits = (scale * teacher).log_softmax(-1), (scale * student).requires_grad_()
            values = loss.divergence(logp, logits.log_softmax(-1))
            expected = torch.autograd.grad(values.sum(), logits)[0]
            value, grad = loss.gradient(logp.clone(), logits.detach().log_softmax(-1))
            _require(_close(value, values.detach()), loss, "gradient() must return the values of divergence()")
            _require(
                _close(grad, expected),
                loss,
                "gradient() must return the gradient of divergence() with respect to the logits",
            )


def _require(condition: bool, loss: Loss, promise: str) -> None:
    if not condition:
        raise broken(loss, promise)


def _require_graph(loss: Loss, output: LossOutput) -> None:
    _require(output.total.requires_grad, loss, "the total must have a graph, even without response positions")


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def _logits(batch: Batch) -> tuple[Tensor, Tensor]:
    """`[N, V]` float64 logits of a student and of a teacher; the same for every batch of N positions."""
    shape, generator = (batch.num_tokens, VOCAB), torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def _compare(loss: Loss, student: Tensor, teacher: Tensor, batch: Batch) -> tuple[LossOutput, Tensor]:
    """The loss of `[N, V]` logits, and its gradient with respect to the student's."""
    leaf = student.detach().clone().requires_grad_()
    teacher_scores = Scores.from_logits(teacher) if loss.needs_teacher else None
    output: LossOutput = loss(Scores.from_logits(leaf), teacher_scores, batch)
    _require_graph(loss, output)
    return output, torch.autograd.grad(output.total.sum(), leaf)[0]


def _model(batch: Batch, seed: int, slicing: Slicing | None = None) -> Scores:
    """Scores of a model with a single weight `[V, D]`, which is both embedding and head (tied weights)."""
    head = nn.Linear(5, VOCAB, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    hidden = torch.tanh(head.weight[batch.input_ids]).flatten(0, 1)  # [B·T, D]
    return Scores(hidden[batch.positions], head, VOCAB, slicing=slicing or Slicing())


def _compare_models(loss: Loss, batch: Batch, slicing: Slicing | None = None) -> tuple[LossOutput, Tensor]:
    """The loss of two models with tied weights, and its gradient with respect to the student's weight."""
    student, teacher = _model(batch, 1, slicing), _model(batch, 2)
    output: LossOutput = loss(student, teacher if loss.needs_teacher else None, batch)
    return output, torch.autograd.grad(output.total.sum(), list(student.head.parameters()))[0]


def _log_prob_pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of `[n, V]` float64 log-probabilities: plain, peaked, nearly equal, and with excluded tokens."""
    generator = torch.Generator().manual_seed(11)
    p, q, noise = (torch.randn(16, VOCAB, generator=generator, dtype=torch.float64) for _ in range(3))
    excluded = torch.zeros(16, VOCAB, dtype=torch.bool)
    excluded[:, -1] = True
    for logits in ((p, q), (30 * p, 30 * q), (p, p + 1e-4 * noise), (p.masked_fill(excluded, -torch.inf),) * 2):
        yield logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    yield tuple(logits.masked_fill(excluded, -torch.inf).log_softmax(-1) for logits in (p, q))  # type: ignore[misc]

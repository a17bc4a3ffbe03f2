"""Two streams, one for each model, give what one stream gives.

On one stream everything waits for everything. What a missing wait would spoil is made visible: the teacher's stream
gets work that takes milliseconds before its scores and before its masks, and memory that is read too early holds zeros.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from distillkit.devices.streams import side_stream
from distillkit.losses import DistiLLM2, ForwardKL
from distillkit.models import packing
from distillkit.models.scoring import packs, score, side_by_side
from distillkit.types import Batch, Scores
from gpu.small import ON_CPU, VOCAB, assert_near, needs_cuda, packed_batch, qwen2

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic", "slow_masks")]

STEPS = 6 if ON_CPU else 12
CYCLES = 20_000_000  # of the GPU's clock, about 10 ms
ROUNDING = 1e-5  # a product on another stream may be another kernel; a race gives other numbers altogether


def busy(cycles: int = CYCLES) -> None:
    """Keeps the current stream busy."""
    if not ON_CPU:
        torch.cuda._sleep(cycles)


@pytest.fixture
def slow_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is made milliseconds after the host has asked for it, as one of a long line is on a busy device."""
    original = packing.create_block_mask

    def late(*args: Any, **kwargs: Any) -> Any:
        busy()
        return original(*args, **kwargs)

    monkeypatch.setattr(packing, "create_block_mask", late)


def _scores(device: torch.device) -> Scores:
    return Scores.from_logits(torch.zeros(1, VOCAB, device=device))


def zeros_in_free_memory(device: torch.device) -> None:
    """What is allocated next on the teacher's stream holds zeros until something is written to it."""
    if ON_CPU:
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(side_stream(device, "teacher")):
        blocks = [torch.zeros(size, dtype=torch.uint8, device=device) for size in (2**19,) * 128 + (2**24,) * 8]
    torch.cuda.synchronize()
    del blocks


def on_one_stream(
    student: Callable[[], Scores], teacher: Callable[[], Scores], device: torch.device
) -> tuple[Scores, Scores]:
    by_teacher = teacher()
    return student(), by_teacher


def train(device: torch.device, run: Callable[..., Any], delay: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and weights of steps on batches of several lengths, one loss after the other."""
    student, teacher = qwen2(seed=2).to(device).train(), qwen2(layers=6, seed=1).to(device).requires_grad_(False)
    assert packs(student)
    assert packs(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    objectives = (ForwardKL().to(device), DistiLLM2().to(device))
    losses = []

    def by_teacher(batch: Batch) -> Scores:
        if delay:
            busy()
        with torch.no_grad():
            return score(teacher, batch, VOCAB)

    for step in range(STEPS):
        if delay:
            zeros_in_free_memory(device)
        batch = packed_batch((150, 420, 260)[step % 3], seed=step).to(device)
        scores = run(partial(score, student, batch, VOCAB), partial(by_teacher, batch), device)
        total = objectives[step % 2](*scores, batch).total.sum() / len(batch.lengths)
        del scores
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.detach())
    return [float(loss) for loss in losses], [tensor.detach() for tensor in student.parameters()]


def test_training_on_two_streams_is_training_on_one(device: torch.device) -> None:
    losses, weights = train(device, on_one_stream, delay=False)
    assert len(set(losses)) == STEPS
    for _ in range(1 if ON_CPU else 2):
        own_losses, own_weights = train(device, side_by_side, delay=True)
        assert own_losses == pytest.approx(losses, rel=ROUNDING)
        assert_near(own_weights, weights, ROUNDING)


def test_the_student_waits_for_the_mask_that_the_teacher_made(device: torch.device) -> None:
    # Both models read `batch.packed.masks`: the teacher, who comes first, fills it on its own stream.
    student, teacher = qwen2(seed=2).to(device), qwen2(seed=1).to(device)
    for model in (student, teacher):
        assert packs(model)
    with torch.no_grad():
        expected = score(student, packed_batch(400).to(device), VOCAB).hidden
        score(teacher, packed_batch(260, seed=1).to(device), VOCAB)  # compiles what is to be compiled
        zeros_in_free_memory(device)
        batch = packed_batch(400).to(device)

        by_student, _ = side_by_side(lambda: score(student, batch, VOCAB), lambda: score(teacher, batch, VOCAB), device)
    assert_near([by_student.hidden], [expected], ROUNDING)


def test_the_teacher_waits_for_what_the_device_was_given_before(device: torch.device) -> None:
    source = torch.zeros(1000, VOCAB, device=device)
    busy(5 * CYCLES)
    source += 1.0  # on the current stream, after the work above

    def by_teacher() -> Scores:
        return Scores.from_logits(source * 2)

    scores = side_by_side(lambda: Scores.from_logits(source), by_teacher, device)
    assert [float(one.hidden.mean()) for one in scores] == [1.0, 2.0]


def test_the_loss_waits_for_the_teacher(device: torch.device) -> None:
    def by_teacher() -> Scores:
        busy(5 * CYCLES)
        return Scores.from_top_k(*(torch.full((500, 4), 7.0, device=device) for _ in range(3)))

    zeros_in_free_memory(device)
    _, scores = side_by_side(lambda: _scores(device), by_teacher, device)
    assert scores is not None
    assert [float(tensor.mean()) for tensor in (scores.hidden, scores.top_k_ids, scores.target_logp)] == [7.0] * 3


@needs_cuda
def test_memory_of_the_teachers_scores_is_not_used_again_before_the_loss_is_done_with_it(device: torch.device) -> None:
    def by_teacher(value: float, count: int) -> Scores:
        blocks = [torch.full((2000, 64), value, device=device) for _ in range(count)]
        return Scores.from_top_k(*blocks[:3])

    for _ in range(5):
        _, scores = side_by_side(lambda: _scores(device), partial(by_teacher, 3.0, 3), device)
        assert scores is not None
        busy(5 * CYCLES)
        means = torch.stack([tensor.mean() for tensor in (scores.hidden, scores.top_k_ids, scores.target_logp)])
        del scores
        side_by_side(lambda: _scores(device), partial(by_teacher, 1e9, 20), device)  # the next step
        assert means.tolist() == [3.0] * 3


def test_without_a_teacher_the_student_alone_is_asked(device: torch.device) -> None:
    scores, nobody = side_by_side(lambda: _scores(device), None, device)
    assert nobody is None
    assert scores.hidden.device == device

"""Memory of the device: what a run leaves behind, and what a loss takes at its peak.

Letters: N response positions, D hidden width, V vocabulary.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distillkit import Sampling, Student
from distillkit.chunked.output_head import OutputHead
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.losses import DistiLLM2, ForwardKL, GeneralizedJSD
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.testing import make_batch
from distillkit.types import Scores, Slicing
from gpu.small import ON_CPU, data_of, fit, module_of, needs_cuda, save_models

pytestmark = pytest.mark.gpu

MIB = 2**20
SLACK = 2 * MIB
"""Less than a fifth of the smaller model below; kernels and random states take some kilobytes."""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student of 13 MiB, or 39 MiB with gradients and Adam's moments, and a teacher of 20 MiB; small on the CPU."""
    return save_models(tmp_path_factory.mktemp("larger"), hidden=64 if ON_CPU else 512)


def allocated() -> int:
    """Bytes of tensors on the device; 0 on the CPU."""
    gc.collect()
    if ON_CPU:
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # kept for each stream, for good
    return torch.cuda.memory_allocated()


def one_run(folder: Path, models: tuple[str, str], kind: str) -> None:
    """A run with validation, after which nothing of it is referred to."""
    settings: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
        "loss": DistiLLM2(),
    }
    short = Sampling(max_new_tokens=4)
    if kind == "ahead":
        curator = PairedCurator(TeacherCurator(short), StudentCurator(short, {"every": 2}))
        settings |= {"curator": curator, "overlap": True}
    elif kind == "cached":
        settings |= {"teacher": CachedTeacher(TransformersTeacher(models[0], "float32"), folder=str(folder / "kept"))}
    elif kind == "packed":
        settings |= {"student": Student(models[1], gradient_checkpointing=True)}
    layout = "shared" if kind == "packed" else "padded"
    fit(
        folder,
        module_of(models, **settings),
        data_of(folder / "data", held_out=2, layout=layout),
        max_epochs=1 if ON_CPU else 2,
    )


@pytest.mark.parametrize("kind", ["plain", "packed", "cached", "ahead"])
def test_memory_is_given_back_after_a_run_and_a_second_one_adds_nothing(
    kind: str, larger: tuple[str, str], tmp_path: Path
) -> None:
    before = allocated()
    after = []
    for number in range(1 if ON_CPU else 2):
        one_run(tmp_path / str(number), larger, kind)
        after.append(allocated())
    assert after[0] <= before + SLACK
    assert after[-1] <= after[0] + SLACK // 8


def scores_of(seed: int, positions: int, width: int, vocab: int, device: torch.device, memory: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, vocab, bias=False)
    head.weight.data = 0.1 * torch.randn(vocab, width, generator=generator)
    hidden = torch.randn(positions, width, generator=generator).to(device).requires_grad_()
    return Scores(hidden, OutputHead(head.to(device), vocab), vocab, slicing=Slicing(memory))


@pytest.mark.parametrize("loss", [ForwardKL(), GeneralizedJSD(), DistiLLM2()], ids=lambda loss: type(loss).__name__)
def test_the_peak_of_a_loss_is_its_budget_and_the_gradients(loss: Any, device: torch.device) -> None:
    length, rows, width, vocab, memory = (8, 4, 16, 500, 1) if ON_CPU else (64, 32, 64, 32_000, 16)
    positions = length * rows
    batch = make_batch(
        (length,) * rows, ("teacher", "student") * (rows // 2), tuple(row // 2 for row in range(rows)), vocab
    ).to(device)
    student, teacher = (scores_of(seed, positions, width, vocab, device, memory) for seed in (1, 2))
    loss = loss.to(device)
    gradients = 4 * width * (positions + vocab)
    for number in range(2):  # the first run makes cuBLAS' workspaces, and measures what the loss needs
        gc.collect()
        before = 0 if ON_CPU else torch.cuda.memory_allocated()
        if not ON_CPU:
            torch.cuda.reset_peak_memory_stats()
        total = loss(student, teacher, batch).total.sum()
        total.backward()
        assert student.hidden.grad is not None
        student.hidden.grad, student.head.module.weight.grad = None, None
        if number and not ON_CPU:
            peak = torch.cuda.max_memory_allocated() - before
            assert gradients < peak < memory * MIB + 2 * gradients + SLACK
            assert 4 * positions * vocab > 10 * memory * MIB, "logits of all positions would not fit"


@needs_cuda
def test_hidden_states_of_a_batch_are_freed_before_the_next(larger: tuple[str, str], tmp_path: Path) -> None:
    peaks = []

    class Peak(DistiLLM2):
        def forward(self, *args: Any) -> Any:
            peaks.append(torch.cuda.memory_allocated())
            return super().forward(*args)

    module = module_of(larger, loss=Peak())
    fit(tmp_path, module, data_of(tmp_path / "data", prompts=24, batch_size=2))
    assert len(peaks) == 12
    assert max(peaks[3:]) <= peaks[2] + SLACK

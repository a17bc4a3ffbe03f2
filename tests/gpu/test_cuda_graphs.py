"""Layers that are compiled, recorded as CUDA graphs, train as layers that are not.

On the CPU dynamo cuts the layers as on a GPU, and what it cuts is run as it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit import DistillModule, Student
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import DistiLLM2, ForwardKL
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Sampling
from gpu.small import ON_CPU, assert_near, data_of, fit, module_of, needs_cuda, packed_batch, weights_of
from helpers.pairs import prompts_of
from helpers.runs import MemoryLogger, UnequalPairs

pytestmark = pytest.mark.gpu

BUCKET = 256
"""Every batch of the runs below is filled up to this length, held-out ones aside."""


@pytest.fixture(autouse=True)
def _cut_by_dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_CPU:
        yield
        return

    compile = torch.nn.Module.compile

    def eagerly(module: Any, mode: Any = None, dynamic: Any = None) -> None:
        compile(module, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    yield
    torch._dynamo.reset()


def run(
    folder: Path, models: tuple[str, str], compile: Any, compile_teacher: Any, loss: Any, **settings: Any
) -> tuple[DistillModule, MemoryLogger]:
    """Four steps with a validation in the middle and at the end."""
    teacher = TransformersTeacher(models[0], "float32", compile=compile_teacher)
    student = Student(models[1], compile=compile, **settings)
    module = module_of(
        models,
        student=student,
        teacher=teacher,
        loss=loss,
        curator=UnequalPairs(),
        answers=Sampling(temperature=0.0, max_new_tokens=1),
    )
    data = data_of(folder / "data", prompts=8, held_out=2, layout="shared", bucket=BUCKET)
    return module, fit(folder, module, data, val_check_interval=2, num_sanity_val_steps=0)


GRAPHS = "reduce-overhead"


@pytest.mark.parametrize(
    ("compile", "compile_teacher", "loss", "settings"),
    [
        pytest.param(GRAPHS, False, ForwardKL, {}, id="graphs of the student", marks=needs_cuda),
        pytest.param(GRAPHS, GRAPHS, DistiLLM2, {}, id="graphs of both"),
        pytest.param(
            True,
            True,
            ForwardKL,
            {"gradient_checkpointing": True},
            id="kernels for all lengths",
            marks=[pytest.mark.slow, needs_cuda],
        ),
    ],
)
def test_compiled_models_train_as_models_that_are_not(
    compile: Any, compile_teacher: Any, loss: Any, settings: Any, models: tuple[str, str], tmp_path: Path
) -> None:
    plain, expected = run(tmp_path / "plain", models, False, False, loss(), **settings)
    module, log = run(tmp_path / "compiled", models, compile, compile_teacher, loss(), **settings)
    losses = log.column("train/loss")
    assert len(losses) == 4
    assert len(set(losses)) == 4
    # Fused kernels round otherwise, 1e-6 a step; a graph that reads what another has overwritten gives other numbers.
    assert losses == pytest.approx(expected.column("train/loss"), rel=1e-3)
    assert len(log.column("val/kl")) == 2
    assert log.column("val/kl") == pytest.approx(expected.column("val/kl"), rel=1e-3)
    assert_near(list(weights_of(module).values()), list(weights_of(plain).values()), 2e-3)


def test_hidden_states_of_compiled_layers_are_those_of_the_model_batch_after_batch(
    models: tuple[str, str], device: torch.device
) -> None:
    # The teacher alone, without gradients: each layer reads what the graph of the one before has written.
    plain, compiled = (TransformersTeacher(models[0], "float32", compile=mode) for mode in (False, GRAPHS))
    for teacher in (plain, compiled):
        teacher.setup(device)
    for seed in range(3):
        batch = packed_batch(200, seed, plain.vocab_size, BUCKET).to(device)
        assert_near([compiled.score(batch).hidden], [plain.score(batch).hidden], 1e-4)


def test_generation_makes_no_kernels_of_a_compiled_model(models: tuple[str, str], device: torch.device) -> None:
    student = Student(models[1], compile=GRAPHS)
    model, tokenizer = student.load().to(device), student.tokenizer()
    generator = TransformersGenerator(progress=False)
    generator.refresh(model, tokenizer)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generator.generate(prompts_of(len(tokenizer), (3, 5)), Sampling(temperature=0.0, max_new_tokens=3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_saved_weights_have_the_names_of_a_model_that_is_not_compiled(models: tuple[str, str]) -> None:
    plain, compiled = Student(models[1]).load(), Student(models[1], compile="reduce-overhead").load()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in compiled.state_dict().items())

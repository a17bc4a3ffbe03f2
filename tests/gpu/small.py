"""Small models, batches and runs for the GPU. Heads are 16 wide: Triton multiplies nothing narrower.

Letters: L tokens of packed rows.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from distillkit import DistillData, DistillModule, Student
from distillkit.curators.single import DatasetCurator
from distillkit.data.collate import collate
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import ForwardKL
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Batch, Row, Sampling
from helpers.models import END_ID, save_tiny
from helpers.runs import MemoryLogger, write_prompts

ON_CPU = os.environ.get("DISTILLKIT_GPU_TESTS_ON") == "cpu"
needs_cuda = pytest.mark.skipif(ON_CPU, reason="says nothing on the CPU")

HIDDEN, HEADS, KEY_HEADS = 64, 4, 2
VOCAB = 90
TRAINER: dict[str, Any] = {
    "accelerator": "cpu" if ON_CPU else "gpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
    "max_epochs": 1,
}
SHORT = Sampling(temperature=0.0, max_new_tokens=4)


def save_models(folder: Path, **config: Any) -> tuple[str, str]:
    """A teacher of three layers and a student of two."""
    shape = {"hidden": HIDDEN, **config}
    teacher = save_tiny(folder / "teacher", layers=3, seed=1, **shape)
    return str(teacher), str(save_tiny(folder / "student", layers=2, seed=2, **shape))


def qwen2(layers: int = 2, seed: int = 0, window: int | None = None, vocab: int = VOCAB) -> Any:
    """A random Qwen 2 with grouped heads; with a window, its last layer attends to so many tokens."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=True,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=layers - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def packed_batch(length: int, seed: int = 0, vocab: int = VOCAB, bucket: int = 1) -> Batch:
    """Pairs that share their prompt, and single rows, of about `length` tokens end to end."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        number = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(vocab, (number,), generator=generator).tolist())

    rows: list[Row] = []
    room, index = length, 0
    while room > 0:
        prompt, writers = draw(5, 20), ("teacher", "student")[: 1 + index % 3]
        for writer in writers:
            response = draw(3, 17)
            mask = (False,) * len(prompt) + (True,) * len(response)
            rows.append(Row(prompt + response, mask, writer, str(index)))
            room -= len(response)
        room, index = room - len(prompt), index + 1
    return collate(rows, pad_id=0, bucket=bucket)


def module_of(models: tuple[str, str], **settings: Any) -> DistillModule:
    """A module in float32 that trains on the data's responses."""
    student = settings.pop("student", None) or Student(models[1])
    teacher = settings.pop("teacher", None) or TransformersTeacher(models[0], "float32")
    options: dict[str, Any] = {
        "loss": ForwardKL(),
        "curator": DatasetCurator(),
        "generator": TransformersGenerator(progress=False),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        "lr_schedule": "constant",
        "warmup": 0.0,
        "answers": SHORT,
    } | settings
    return DistillModule(student, teacher=teacher, **options)


def data_of(folder: Path, prompts: int = 8, held_out: int = 0, **settings: Any) -> DistillData:
    """Prompts with responses; padded rows unless asked otherwise, so that flex attention is compiled only for some."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_prompts(folder / "train.jsonl", prompts, response=True)
    val = write_prompts(folder / "val.jsonl", held_out, response=True) if held_out else None
    return DistillData(train, val, **{"batch_size": 2, "layout": "padded"} | settings)


def fit(
    folder: Path,
    module: DistillModule,
    data: DistillData,
    callbacks: Sequence[lightning.Callback] = (),
    ckpt_path: str | None = None,
    **trainer: Any,
) -> MemoryLogger:
    """Trains, and returns what was logged."""
    logger = MemoryLogger()
    settings: Mapping[str, Any] = TRAINER | {"logger": logger, "callbacks": list(callbacks)} | trainer
    lightning.Trainer(default_root_dir=folder, **settings).fit(module, data, ckpt_path=ckpt_path)
    return logger


def weights_of(module: DistillModule) -> dict[str, torch.Tensor]:
    """The student's weights on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.student.state_dict().items()}


def assert_near(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """Each tensor is off by at most `tolerance` of its largest entry, or by `floor`."""
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + floor


def distance(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to the norm of those that are expected."""
    pairs = [(a.detach().double().cpu(), e.detach().double().cpu()) for a, e in zip(actual, expected, strict=True)]
    gap, size = (
        torch.stack([tensor.norm() for tensor in many]).norm()
        for many in zip(*[(a - e, e) for a, e in pairs], strict=True)
    )
    return float(gap / size)

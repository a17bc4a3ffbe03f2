"""Generation speed of transformers and of this package's generators, at one batch size."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import generation
import torch
import transformers
from steps.workload import SHAPES, Setup, load_model, load_tokenizer

from distillkit.models import Student
from distillkit.types import Prompt, Prompts
from gpu_parts.cases import Row, Settings


def generate(
    settings: Settings, side: str, shape: str, prompts: int, prompt_tokens: int, new_tokens: int
) -> Iterator[Row]:
    """Greedy and sampled responses of one side, all prompts in one batch.

    Args:
        settings: Device, and the real model if there is one.
        side: One of `generation.SIDES`.
        shape: A key of `SHAPES` whose student is drawn where there is no real model.
        prompts: How many.
        prompt_tokens: Length of each drawn prompt.
        new_tokens: Longest response.
    """
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, batch = loaded(settings, folder, shape, prompts, prompt_tokens)
        texts = []
        for sampling in generation.SAMPLINGS:
            work = generation.Work(side, "bfloat16", sampling, prompts, new_tokens, prompts, os.cpu_count() or 1)
            row = measure(work, model, tokenizer, batch, settings.device)
            texts.append(f"{sampling} {row['tokens_per_second']:,.0f}")
            yield {"side": side, "sampling": sampling, "model": settings.real or shape, "batch": prompts} | row
        yield {"figure": f"{', '.join(texts)} tokens/s"}


def measure(work: generation.Work, model: Any, tokenizer: Any, prompts: Prompts, device: str) -> Row:
    """Tokens per second, after a warm-up."""
    write = generation.writer(work, model, tokenizer)
    write(prompts, work.settings(4))
    synchronize(device)
    start = perf_counter()
    written = write(prompts, work.settings(work.tokens))
    synchronize(device)
    seconds = perf_counter() - start
    count = sum(map(len, written))
    return {"new_tokens": count, "seconds": seconds, "tokens_per_second": count / seconds}


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def loaded(settings: Settings, folder: str, shape: str, count: int, prompt_tokens: int) -> tuple[Any, Any, Prompts]:
    """A model in bfloat16 on the device, its tokenizer, and prompts."""
    if settings.real is not None:
        student = Student(settings.real, dtype="bfloat16")
        model, tokenizer = student.load().to(settings.device), student.tokenizer()
        model.eval().requires_grad_(False)
        return model, tokenizer, generation.quickstart_prompts(tokenizer, model, count)
    SHAPES[shape].save(Path(folder))
    setup = Setup(
        folder=folder,
        shape=shape,
        lengths="even",
        rows=2,
        steps=1,
        device=settings.device,
        precision="bf16-true",
        threads=1,
    )
    model, tokenizer = load_model(setup, "student").eval().requires_grad_(False), load_tokenizer(setup)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(16, model.config.vocab_size, (count, prompt_tokens), generator=generator).tolist()
    return model, tokenizer, Prompts(tuple(Prompt(f"{index:08x}", (), tuple(row)) for index, row in enumerate(rows)))

"""A whole optimizer step, with models whose weights are drawn on the device: distillkit's and TRL's trainers."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning import Callback
from steps import with_distillkit as step_distillkit
from steps import with_trl as step_trl
from steps.clock import StepClock
from steps.workload import SHAPES, Setup, load_tokenizer, step_examples
from transformers import AutoConfig, AutoModelForCausalLM

from distillkit.callbacks import ModelFlops, matrix_rate, model_flops
from distillkit.data import Layout, collate
from distillkit.losses import DistiLLM2
from gpu_parts import kernels
from gpu_parts.cases import OutOfTimeError, Row, Settings

WARM_UP, MEASURED = 2, 3
"""Steps."""
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """The rows of a step; plain values.

    Args:
        shape: A key of `SHAPES`.
        rows: Rows of a step, two for each prompt.
        micro_batches: How many a step is split into.
        prompt: Tokens of each prompt.
        response: Tokens of each response.
    """

    shape: str
    rows: int
    micro_batches: int
    prompt: int
    response: int

    def setup(self, settings: Settings, folder: str, precision: str) -> Setup:
        """Settings of the trainers."""
        return Setup(
            folder=folder,
            shape=self.shape,
            lengths="even",
            rows=self.rows,
            steps=WARM_UP + MEASURED,
            device=settings.device,
            precision=precision,
            threads=torch.get_num_threads(),
            micro_batches=self.micro_batches,
            exact=(self.prompt, self.response),
        )


def distillkit(
    settings: Settings,
    work: dict[str, Any],
    layout: Layout = "shared",
    precision: str = "bf16-mixed",
    cached: bool = False,
    loss: str = "ForwardKL",
) -> Iterator[Row]:
    """Distillkit's module under Lightning's Trainer."""
    options: dict[str, Any] = {"cached": cached, "layout": layout, "loss": DistiLLM2() if loss == "DistiLLM2" else None}
    with tempfile.TemporaryDirectory() as folder:
        setup = prepared(settings, work, folder, precision)
        if cached:
            step_distillkit.fit(setup, StepClock(setup.device), **options)
            options["loss"] = None
        clock = StepClock(setup.device)
        step_distillkit.fit(setup, clock, **options)
        columns = {"trainer": "distillkit", "loss_name": loss, "layout": layout, "cached": cached}
        yield columns | summary(settings, setup, clock, layout, has_teacher=not cached)


def trl(settings: Settings, work: dict[str, Any], trainer: str, liger: bool = False) -> Iterator[Row]:
    """One of TRL's trainers on the same rows, with prompts of rows that it pads by itself."""
    run: Callable[..., None] = {"GKDTrainer": step_trl.gkd, "DistillationTrainer": step_trl.distillation}[trainer]
    with tempfile.TemporaryDirectory() as folder:
        setup = prepared(settings, work, folder, "bf16-mixed")
        clock = StepClock(setup.device)
        run(setup, clock, **({"use_liger_kernel": True} if liger else {}))
        columns = {"trainer": f"TRL {trainer}" + (" with Liger" if liger else ""), "loss_name": "ForwardKL"}
        yield columns | {"layout": "padded", "cached": False} | summary(settings, setup, clock, "packed")


def prepared(settings: Settings, work: dict[str, Any], folder: str, precision: str) -> Setup:
    """A setup whose models' configurations are in the folder."""
    entry = Work(**work)
    SHAPES[entry.shape].save(Path(folder))
    return entry.setup(settings, folder, precision)


def summary(settings: Settings, setup: Setup, clock: StepClock, layout: Layout, has_teacher: bool = True) -> Row:
    """The columns of a run.

    Raises:
        OutOfTimeError: If there is no measured step.
    """
    times = clock.result()
    seconds = times["wall"][WARM_UP - 1 :]  # the clock has no time for the first step
    if not seconds:
        raise OutOfTimeError("no step was measured")
    rows = step_examples(setup)[-1]
    tokens = sum(len(row.prompt) + len(row.response) for row in rows)
    responses = sum(len(row.response) for row in rows)
    step = median(seconds)
    rate = best_rate(settings.device)
    utilisation = step_flops(setup, layout, has_teacher) / step / rate
    return {
        "shape": setup.shape,
        "rows": setup.rows,
        "row_tokens": tokens // len(rows),
        "micro_batches": setup.micro_batches,
        "precision": setup.precision,
        "step_ms": 1e3 * step,
        "tokens_per_second": tokens / step,
        "response_tokens_per_second": responses / step,
        "mfu": 100 * utilisation,
        "matrix_rate_tflops": rate / 1e12,
        "peak_gib": times["peak"] / GIB,
        "first_loss": times["losses"][0],
        "last_loss": times["losses"][-1],
        "step_seconds": times["wall"],
        "figure": f"{tokens / step / 1e3:.1f}k tokens/s, MFU {100 * utilisation:.0f} %, {times['peak'] / GIB:.1f} GiB",
    }


@cache
def best_rate(device: str) -> float:
    """FLOPs per second of a large product in bfloat16."""
    return matrix_rate(torch.device(device), torch.bfloat16)[0]


def step_flops(setup: Setup, layout: Layout, has_teacher: bool) -> float:
    """FLOPs that a step needs with its rows laid out so: no padding, no recomputation, heads at response positions."""
    student, teacher = (shape_flops(setup, name, name == "student") for name in ("student", "teacher"))
    if not has_teacher:
        teacher = ModelFlops(position=teacher.position, packed=True)
    examples = step_examples(setup)[-1]
    size, pad = setup.rows // setup.micro_batches, load_tokenizer(setup).pad_token_id
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    useful: Layout = "packed" if layout == "padded" else layout
    batches = [collate([step_distillkit.as_row(row) for row in part], pad, useful) for part in parts]
    return sum(student.of(batch) + teacher.of(batch) for batch in batches)


def shape_flops(setup: Setup, name: str, trained: bool) -> ModelFlops:
    """The cost of a model, from its configuration."""
    with torch.device("meta"):  # eager attention is not tried out, for which there would have to be weights
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(setup.path(name)), attn_implementation="eager"
        )
    return model_flops(model, trained, packed=True)


def profile(settings: Settings, work: dict[str, Any]) -> Iterator[Row]:
    """Where the device's time goes in two steps of distillkit with a live teacher."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepared(settings, work, folder, "bf16-mixed")
        steps = ProfiledSteps(setup)
        step_distillkit.fit(setup, StepClock(setup.device), callbacks=[steps])
    yield from kernels.shares(steps.profiler, settings.device, steps.seconds)


class ProfiledSteps(Callback):
    """Profiles two steps after the warm-up."""

    def __init__(self, setup: Setup) -> None:
        self.first, self.last = WARM_UP * setup.micro_batches, (WARM_UP + 2) * setup.micro_batches - 1
        self.profiler = kernels.make_profiler(setup.device)
        self.seconds = 0.0
        self.device = setup.device

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts."""
        if batch_idx == self.first:
            kernels.synchronize(self.device)
            self.profiler.start()
            self.seconds = -perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops."""
        if batch_idx == self.last:
            kernels.synchronize(self.device)
            self.seconds += perf_counter()
            self.profiler.stop()

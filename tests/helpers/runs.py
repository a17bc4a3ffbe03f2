"""Tiny runs: models and prompts on disk, parts that need no generation, and processes that may be killed."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback
from lightning.pytorch.loggers.logger import Logger

from distillkit.cli.main import main
from distillkit.interfaces import Curator
from distillkit.models.student import Student
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Prompts, Row
from helpers.models import save_tiny

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
"""Settings of the trainer that all tests share."""


def save_models(folder: Path) -> tuple[str, str]:
    """A teacher of three layers and a student of two, as folders."""
    teacher = save_tiny(folder / "teacher", layers=3, seed=1)
    return str(teacher), str(save_tiny(folder / "student", layers=2, seed=2))


def write_prompts(path: Path, count: int, response: bool = False) -> str:
    """A JSONL file of `count` prompts of different lengths."""
    rows = [{"prompt": f"What is {'very ' * (i % 4)}{i}?"} for i in range(count)]
    if response:
        rows = [row | {"response": f"It is {'so ' * (i % 3)}{i}."} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class DoubleStudent(Student):
    """A student in float64, so that two ways to one sum differ little: its RMSNorm alone still rounds to float32."""

    def load(self) -> Any:
        return super().load().double()


class DoubleTeacher(TransformersTeacher):
    """A teacher in float64."""

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        self._model.double()


class UnequalPairs(Curator):
    """Two rows per prompt, of 1 to 9 tokens that depend on the prompt alone, by the writers that are named."""

    def __init__(self, names: Sequence[str] = ("teacher", "student")) -> None:
        super().__init__()
        self.names = tuple(names)

    @property
    def rounds(self) -> str:
        return "once"

    @property
    def writers(self) -> frozenset[str]:
        return frozenset()

    def curate(self, prompts: Prompts, generators: Mapping[str, Any]) -> list[Row]:
        return [self._row(prompt, name) for prompt in prompts for name in self.names]

    def _row(self, prompt: Any, name: str) -> Row:
        generator = torch.Generator().manual_seed(int(prompt.id[:8], 16) + len(name))
        length = int(torch.randint(1, 10, (), generator=generator))
        ids = tuple(torch.randint(2, 250, (length,), generator=generator).tolist())
        mask = (False,) * len(prompt.input_ids) + (True,) * length
        return Row(prompt.input_ids + ids, mask, name, prompt.id)


class Gradients(Callback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in pl_module.student.named_parameters()})


class MemoryLogger(Logger):
    """Keeps what is logged, as (step, figures)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), {name: float(value) for name, value in metrics.items()}))

    def column(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


ROUNDING = 1e-6
"""Relative tolerance: a value on the edge of two float32 numbers may be rounded either way. Measured up to 3e-8."""


def assert_same_steps(steps: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    """Compares gradients step by step, in float64."""
    assert len(steps) == len(expected) > 0
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert any(bool(grad.abs().max() > 1e-3) for grad in theirs.values())
        for name, grad in theirs.items():
            assert grad.dtype == torch.float64
            torch.testing.assert_close(ours[name], grad, rtol=ROUNDING, atol=1e-8)


def write_config(path: Path, config: dict[str, Any]) -> str:
    """A YAML file of `config`."""
    path.write_text(yaml.safe_dump(config))
    return str(path)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# They are forked from a server that has imported everything and run nothing: as clean as a new interpreter, and started
# in a tenth of a second instead of eight.

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "distillkit.workflows.launch",
        "distillkit.callbacks.plots",
        "peft",
        "pandas",
        "torch.utils.tensorboard",
        "transformers.trainer_utils",
        "transformers.models.llama.modeling_llama",
    ]
)


@contextmanager
def process(target: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> Iterator[Any]:
    """A process that runs `target`, which must be importable; killed at the latest when the block is left."""
    child = _context.Process(target=_in_child, args=(target, args, dict(env or {})))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def _in_child(target: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ |= env
    torch.set_num_threads(1)
    raise SystemExit(target(*args))


def finish(child: Any, seconds: float = 120) -> int:
    """The exit status of a process: minus the signal that killed it."""
    child.join(seconds)
    assert child.exitcode is not None, f"still running after {seconds} s"
    return child.exitcode


def command(arguments: list[str]) -> int:
    """The command in a process of its own; its exit status."""
    with process(main, arguments) as child:
        return finish(child)


def logged(log: str, arguments: list[str]) -> int:
    """The command with its output at the end of a file; for a process of its own."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return main(arguments)


def logged_in(folder: str, log: str, arguments: list[str]) -> int:
    """The command as from a shell in a folder, with its output at the end of a file."""
    os.chdir(folder)
    return logged(log, arguments)


def on_two_ranks(target: Callable[..., Any], *args: Any, status: int = 0) -> None:
    """Runs `target` in two processes, which a Trainer with `strategy="ddp", devices=2` takes for its ranks.

    Both must end with `status`.
    """
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    with (
        process(target, *args, env=env | {"LOCAL_RANK": "0"}) as first,
        process(target, *args, env=env | {"LOCAL_RANK": "1"}) as second,
    ):
        assert [finish(first), finish(second)] == [status, status]

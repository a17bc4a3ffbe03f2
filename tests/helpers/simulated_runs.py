"""Runs on the simulated GPU; each function is called in a process of its own, by `in_child`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distillkit import DistillData, DistillModule, Sampling
from distillkit.callbacks import throughput
from distillkit.callbacks.budget import Budget
from distillkit.callbacks.finite import FiniteLoss
from distillkit.callbacks.throughput import Throughput
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import DistiLLM2, ForwardKL, SkewReverseKL
from distillkit.models import packing
from distillkit.models.scoring import packs
from distillkit.models.student import Student
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.testing.tiny import tiny_model, tiny_tokenizer
from distillkit.training import module as module_of_training
from helpers.mutants import mutant
from helpers.pairs import prompts_of
from helpers.runs import MemoryLogger, save_models, write_prompts
from helpers.simulated_streams import WATCH

SHORT = Sampling(max_new_tokens=5)
GREEDY = Sampling(temperature=0.0, max_new_tokens=5)
CPU = torch.device("cpu")

Mutation = tuple[str, str, str]
"""Module, old line, new line."""


class SimAccelerator(CPUAccelerator):
    """Lightning's side of the simulated GPU."""

    def setup_device(self, device: torch.device) -> None:
        pass


def dense_flex(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any
) -> Tensor:
    """Flex attention by the whole matrix of who attends to whom, as the mask's own function says it."""
    index = torch.arange(query.shape[2], device=query.device)
    zero = torch.zeros((), dtype=torch.long, device=query.device)
    allowed = block_mask.mask_mod(zero, zero, index[:, None], index[None, :])
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=enable_gqa)


def fit(
    device: torch.device,
    folder: Path,
    curator: Any,
    loss: Any,
    teacher: Callable[[str], Any] | None = None,
    layout: Any = "shared",
    overlap: Any = False,
    prompts: int = 8,
    dropout: float = 0.0,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[DistillModule, MemoryLogger]:
    """Trains a tiny pair on `device`, four steps if nothing else is said."""
    packing._compiled[:] = [dense_flex]
    folder.mkdir(exist_ok=True, parents=True)
    teacher_folder, student_folder = save_models(folder / "models")
    module = DistillModule(
        DroppingStudent(student_folder, dropout) if dropout else Student(student_folder, dtype="float32"),
        loss,
        (teacher or _live_teacher)(teacher_folder),
        curator,
        TransformersGenerator(progress=False),
        answers=GREEDY,
        overlap=overlap,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_schedule="constant",
        warmup=0.0,
    )
    train = write_prompts(folder / "prompts.jsonl", prompts, response=isinstance(curator, DatasetCurator))
    val = write_prompts(folder / "val.jsonl", 3)
    logger, strategy = MemoryLogger(), SingleDeviceStrategy(device, accelerator=SimAccelerator())
    settings = {"log_every_n_steps": 1, "max_steps": 4, "max_epochs": -1, "enable_checkpointing": False} | settings
    settings["callbacks"] = [*settings.get("callbacks", ()), Unchecked()]
    trainer = Trainer(
        default_root_dir=folder,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy,
        **settings,
    )
    trainer.fit(module, DistillData(train, val=val, batch_size=2, layout=layout), ckpt_path=ckpt_path)
    return module, logger


class Unchecked(FiniteLoss):
    """Takes the place of the check that every run has, for which the host waits once per step."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Looks at nothing."""


class DroppingStudent(Student):
    """A student with dropout in its attention, so that the device's random numbers matter."""

    def __init__(self, source: str, dropout: float) -> None:
        super().__init__(source, dtype="float32")
        self.dropout = dropout

    def load(self) -> Any:
        model = super().load()
        for layer in model.get_decoder().layers:
            layer.self_attn.attention_dropout = self.dropout
        return model


def _live_teacher(source: str) -> TransformersTeacher:
    return TransformersTeacher(source, "float32")


def pairs() -> PairedCurator:
    """Short responses by both, the student's anew in each epoch."""
    return PairedCurator(TeacherCurator(SHORT), StudentCurator(SHORT))


def kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that are made on the device and on the CPU."""

    def cached(keep: Any) -> Callable[[str], Any]:
        return lambda source: CachedTeacher(_live_teacher(source), keep=keep, k=4, folder=str(folder / "cache"))

    return {
        "distillm2": {"curator": pairs(), "loss": DistiLLM2(), "max_steps": 6},
        "kd, packed": {"curator": DatasetCurator(), "loss": ForwardKL(), "layout": "packed"},
        "kd, padded": {"curator": DatasetCurator(), "loss": ForwardKL(), "layout": "padded"},
        "accumulation": {"curator": pairs(), "loss": DistiLLM2(), "accumulate_grad_batches": 2},
        "on-policy": {"curator": StudentCurator(SHORT, "step"), "loss": SkewReverseKL()},
        "cached": {"curator": pairs(), "loss": DistiLLM2(), "teacher": cached("hidden")},
        "top-k": {"curator": pairs(), "loss": ForwardKL(), "teacher": cached("top_k")},
    }


def trained(device: torch.device, kind: str) -> tuple[list[tuple[int, dict[str, float]]], ...]:
    """What a run logs on the device, and on the CPU."""
    logs = []
    for where in (device, CPU):
        with tempfile.TemporaryDirectory() as name:
            logs.append(fit(where, Path(name), **kinds(Path(name))[kind])[1].rows)
    return tuple(logs)


class Waits(Callback):
    """Where the host waited for the device between the end of a step and the end of the next, from the third on."""

    def __init__(self) -> None:
        self.sites: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > 2:
            self.sites.append(dict(WATCH.wait_sites))
        WATCH.wait_sites.clear()


def waits(device: torch.device, kind: str) -> list[dict[str, int]]:
    """Where the host waits in each of the last steps of a run in which nothing is logged."""
    callback = Waits()
    with tempfile.TemporaryDirectory() as name:
        settings = kinds(Path(name))[kind] | {"max_steps": 4, "log_every_n_steps": 100, "limit_val_batches": 0}
        fit(device, Path(name), callbacks=[callback], **settings)
    return callback.sites


def overlapped(device: torch.device) -> list[float]:
    """Losses of a run whose rounds are written ahead."""
    with tempfile.TemporaryDirectory() as name:
        curator = StudentCurator(SHORT, {"every": 2})
        _, logger = fit(device, Path(name), curator, SkewReverseKL(), overlap=True, max_steps=6)
    return logger.column("train/loss")


def streams_used(device: torch.device, run: str, graphs: bool = False) -> list[int]:
    """How many operations went to each stream in a run with a live teacher, or whose rounds are written ahead."""
    if graphs:
        module_of_training.records_graphs = lambda model: model is not None
    if run == "overlapped":
        overlapped(device)
    else:
        with tempfile.TemporaryDirectory() as name:
            fit(device, Path(name), **kinds(Path(name))["kd, packed"])
    return sorted(WATCH.operations.values())


def resumed(device: torch.device) -> tuple[list[float], list[float]]:
    """Losses of a run with dropout from its third step on, and those of a run resumed from its checkpoint there."""
    with tempfile.TemporaryDirectory() as name:
        folder, options = Path(name), {"layout": "padded", "dropout": 0.5, "limit_val_batches": 0}
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2)
        _, whole = fit(
            device,
            folder / "whole",
            DatasetCurator(),
            ForwardKL(),
            callbacks=[saving],
            enable_checkpointing=True,
            **options,
        )
        torch.simgpu.manual_seed(4)
        _, rest = fit(
            device, folder / "rest", DatasetCurator(), ForwardKL(), ckpt_path=str(folder / "step=2.ckpt"), **options
        )
    return whole.column("train/loss")[2:], rest.column("train/loss")


def generated(device: torch.device, temperature: float) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]]:
    """Tokens and log-probabilities that a model writes on the device, and on the CPU."""
    tokenizer, results = tiny_tokenizer(), []
    sampling = Sampling(temperature=temperature, top_p=0.9, max_new_tokens=12)
    for where in (device, CPU):
        model = tiny_model(len(tokenizer)).to(where)
        generator = TransformersGenerator(batch_size=4, progress=False)
        generator.refresh(model, tokenizer)
        responses = generator.generate(prompts_of(len(tokenizer)), sampling)
        results.append([(response.token_ids, response.log_probs) for response in responses])
    return results


def packed(device: torch.device) -> bool:
    """Whether a model is given rows end to end, through flex attention."""
    packing._compiled[:] = [dense_flex]
    return packs(tiny_model(50).to(device))


def timed(device: torch.device) -> dict[str, list[float]]:
    """Figures of the callbacks that take time, and how often Budget made the host wait."""
    throughput.matrix_rate = lambda *_: (1e9, 8)  # torch makes no generator of random numbers for the device
    with tempfile.TemporaryDirectory() as name:
        callbacks = [Throughput(), Budget(seconds=1000.0)]
        before = WATCH.synchronized
        _, logger = fit(device, Path(name), DatasetCurator(), ForwardKL(), callbacks=callbacks, limit_val_batches=0)
    names = ("train/tokens_per_s", "train/mfu", "train/spent_seconds")
    return {name: logger.column(name) for name in names} | {"waits": [float(WATCH.synchronized - before)]}


def mutated(device: torch.device, mutation: Mutation, run: Callable[..., Any], *args: Any) -> Any:
    """A run with one line of the package changed."""
    with mutant(*mutation):
        return run(device, *args)


# ── mistakes that the simulation itself has to see ────────────────────────────────────────────────────────────────────


def overwritten(device: torch.device) -> None:
    """Writes to pinned memory while a copy from it is under way."""
    host = torch.ones(3).pin_memory()
    host.to(device, non_blocking=True)
    host.add_(1)


def divided_by_zero(device: torch.device) -> int:
    """Raises an error that has nothing to do with the device."""
    return 1 // 0


def mixed(device: torch.device) -> None:
    """Adds a tensor of the host to one of the device."""
    torch.ones(3, device=device) + torch.ones(3)


def raced(device: torch.device, waits: bool) -> float:
    """Reads on one stream what another one writes."""
    side = torch.simgpu.Stream(device)
    with torch.simgpu.stream(side):
        made = torch.ones(3, device=device)
    if waits:
        torch.simgpu.current_stream(device).wait_stream(side)
    return (made + 1).sum().item()


def reused(device: torch.device, how: str) -> None:
    """Gives memory of a side stream back while the main stream may still read it, and takes some again."""
    side, main = torch.simgpu.Stream(device), torch.simgpu.current_stream(device)
    with torch.simgpu.stream(side):
        made = torch.ones(3, device=device)
    main.wait_stream(side)
    total = made.sum()
    if how == "recorded":
        made.record_stream(main)
    del made
    if how == "waited":
        side.wait_stream(main)
    with torch.simgpu.stream(side):
        torch.zeros(3, device=device)
    assert total.item() == 3


def differentiated(device: torch.device) -> tuple[list[list[float]], list[list[float]], int]:
    """Gradients of a small network on the device and on the CPU, and how often the host waited for them."""
    gradients, waits = [], 0
    for where in (device, CPU):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        network.to(where)
        inputs = torch.arange(8.0).view(2, 4).to(where)
        before = WATCH.waits
        network(inputs).square().sum().backward()
        waits = waits or WATCH.waits - before
        gradients.append([parameter.grad.flatten().tolist() for parameter in network.parameters()])
    return gradients[0], gradients[1], waits

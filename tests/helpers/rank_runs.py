"""Program that test_ranks.py runs, in one process or on each of two ranks."""

from pathlib import Path
from typing import Any

import lightning
import torch

from distillkit import DistillData, DistillModule, Sampling
from distillkit.callbacks import RunCheckpoint
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Curator
from distillkit.losses import DistiLLM2, SkewKL
from helpers.runs import QUIET, DoubleStudent, DoubleTeacher, Gradients, MemoryLogger, UnequalPairs

PROMPTS, GLOBAL_BATCH, HELD_OUT = 9, 4, 3
"""Steps of 4, 4 and 1 prompts: in the last one the second rank has none. Three held-out prompts, two for the first."""


def both(models: tuple[str, str], folder: str, world: int) -> None:
    """The losses with both reductions, and a run that generates."""
    for reduction in ("sequence_mean", "token_mean"):
        run(models, folder, world, f"SkewKL-{reduction}", SkewKL(reduction=reduction), UnequalPairs())
        # Two of three steps form the reference gap; the third one uses it.
        loss = DistiLLM2(reduction=reduction)
        loss.alpha_teacher.warmup_steps = loss.alpha_student.warmup_steps = 2
        run(models, folder, world, f"DistiLLM2-{reduction}", loss, UnequalPairs())
    short = Sampling(max_new_tokens=6)
    pairs = PairedCurator(TeacherCurator(short), StudentCurator(short, {"every": 2}))
    run(models, folder, world, "generated", DistiLLM2(), pairs, val=True)
    run(models, folder, world, "ahead", DistiLLM2(), pairs, overlap=True)


def run(
    models: tuple[str, str],
    folder: str,
    world: int,
    name: str,
    loss: Any,
    curator: Curator,
    val: bool = False,
    overlap: bool = False,
) -> None:
    """One epoch; each rank saves what it saw to `NAME-rank.pt`."""
    root = Path(folder)
    gradients, logger = Gradients(), MemoryLogger()
    module = DistillModule(
        DoubleStudent(models[1]),
        loss,
        DoubleTeacher(models[0]),
        curator,
        TransformersGenerator(progress=False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        lr_schedule="constant",
        warmup=0.0,
        answers=Sampling(temperature=0.0, max_new_tokens=6),
        overlap=overlap,
    )
    held_out = str(root.parent / "held_out.jsonl") if val else None
    data = DistillData(str(root.parent / "prompts.jsonl"), held_out, batch_size=GLOBAL_BATCH // world)
    trainer = lightning.Trainer(
        max_epochs=1,
        default_root_dir=root / name,
        logger=logger,
        callbacks=[gradients, RunCheckpoint()],
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        num_sanity_val_steps=-1,
        **QUIET,
    )
    trainer.fit(module, data)
    seen = {"gradients": gradients.steps, "rows": logger.rows, "history": module.history, "loss": loss.state_dict()}
    torch.save(seen, root / f"{name}-{trainer.global_rank}.pt")

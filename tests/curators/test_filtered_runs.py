"""A run whose curator refuses some responses = a run whose data never had their prompts."""

import json
from pathlib import Path

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule
from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.filters import ResponseFilter
from distillkit.interfaces import Curator
from distillkit.losses import SkewKL
from distillkit.types import Reduction, Row
from helpers.runs import (
    QUIET,
    ROUNDING,
    DoubleStudent,
    DoubleTeacher,
    Gradients,
    MemoryLogger,
    UnequalPairs,
    assert_same_steps,
    save_models,
)

TEXTS = [f"What is {'very ' * (number % 4)}{number}?" for number in range(8)]
REFUSED = (1, 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


class After(ResponseFilter):
    """Refuses the responses to some prompts, by the prompts' tokens."""

    reason = "unwanted"

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        self.prompts = prompts

    def refuses(self, row: Row) -> bool:
        return any(row.input_ids[: len(ids)] == ids for ids in self.prompts)


def run(folder: Path, models: tuple[str, str], curator: Curator, numbers: list[int], size: int, reduction: Reduction):
    """The gradients and the figures of a run over the numbered prompts."""
    teacher, student = models
    file = folder / f"{size}.jsonl"
    file.write_text("".join(json.dumps({"prompt": TEXTS[number]}) + "\n" for number in numbers))
    gradients, logger = Gradients(), MemoryLogger()
    module = DistillModule(
        DoubleStudent(student),
        SkewKL(reduction=reduction),
        DoubleTeacher(teacher),
        curator,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        lr_schedule="constant",
        warmup=0.0,
    )
    trainer = lightning.Trainer(
        max_epochs=1, default_root_dir=folder, logger=logger, callbacks=[gradients], enable_checkpointing=False, **QUIET
    )
    data = DistillData(str(file), batch_size=size, shuffle=False)
    trainer.fit(module, data)
    return gradients, logger, data


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_refused_responses_change_neither_loss_nor_gradient(
    reduction: Reduction, models: tuple[str, str], tmp_path: Path
) -> None:
    rest = [number for number in range(8) if number not in REFUSED]
    expected, figures, data = run(tmp_path, models, UnequalPairs(), rest, 3, reduction)
    unwanted = After([])
    for number in REFUSED:
        text = f"<|im_start|>user\n{TEXTS[number]}<|im_end|>\n<|im_start|>assistant\n"
        unwanted.prompts.append(tuple(data._module().tokenizer(text)["input_ids"]))
    found, ours, _ = run(tmp_path, models, FilteredCurator(UnequalPairs(), [unwanted]), list(range(8)), 4, reduction)
    assert len(expected.steps) == 2
    assert_same_steps(found.steps, expected.steps)
    for (step, own), (other_step, theirs) in zip(ours.rows, figures.rows, strict=True):
        assert step == other_step
        assert own == pytest.approx(theirs, rel=ROUNDING)

"""Micro-batches of an optimizer step = one big batch."""

from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule
from distillkit.errors import ConfigError
from distillkit.interfaces import Loss
from distillkit.losses import CrossEntropy, DistiLLM2, ReverseKL, SkewKL, WeightedSum
from distillkit.rollouts.loader import FixedLoader
from distillkit.types import Reduction
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
    write_prompts,
)

LOSSES: dict[str, Callable[[Reduction], Loss]] = {
    "SkewKL": lambda reduction: SkewKL(reduction=reduction),
    "DistiLLM2": lambda reduction: DistiLLM2(reduction=reduction),
    "CrossEntropy": lambda reduction: CrossEntropy(reduction),
    "WeightedSum": lambda reduction: WeightedSum([CrossEntropy("token_mean"), ReverseKL(reduction)], [0.3, 0.7]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


class Run:
    """A run over `prompts` prompts with steps of four; what it logged and its gradients."""

    def __init__(self, folder: Path, models: tuple[str, str], loss: Loss, accumulate: int, prompts: int = 8) -> None:
        teacher, student = models
        self.gradients, self.logger = Gradients(), MemoryLogger()
        self.module = DistillModule(
            DoubleStudent(student),
            loss,
            DoubleTeacher(teacher),
            UnequalPairs(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            lr_schedule="constant",
            warmup=0.0,
        )
        self.data = DistillData(write_prompts(folder / "prompts.jsonl", prompts), batch_size=4 // accumulate)
        self.trainer = lightning.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            accumulate_grad_batches=accumulate,
            logger=self.logger,
            callbacks=[self.gradients],
            enable_checkpointing=False,
            **QUIET,
        )

    def fit(self) -> "Run":
        self.trainer.fit(self.module, self.data)
        return self


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_micro_batches_have_the_gradient_and_the_figures_of_one_batch(
    loss: str, reduction: Reduction, models: tuple[str, str], tmp_path: Path
) -> None:
    whole, parts = (Run(tmp_path, models, LOSSES[loss](reduction), accumulate).fit() for accumulate in (1, 2))
    batches = list(parts.data.train_dataloader())
    assert len(batches) == 4
    assert batches[0].num_tokens != batches[1].num_tokens, "the test is about unequal counts"
    assert_same_steps(parts.gradients.steps, whole.gradients.steps)
    assert len(parts.logger.column("train/loss")) == 2
    for (step, ours), (other_step, theirs) in zip(parts.logger.rows, whole.logger.rows, strict=True):
        assert step == other_step
        assert ours == pytest.approx(theirs, rel=ROUNDING)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(
    reduction: Reduction, models: tuple[str, str], tmp_path: Path
) -> None:
    # Steps of 4, 4 and 2 prompts; in micro-batches of 1 the last step has two of four.
    whole, parts = (Run(tmp_path, models, SkewKL(reduction=reduction), n, prompts=10).fit() for n in (1, 4))
    assert len(parts.gradients.steps) == 3
    assert_same_steps(parts.gradients.steps, whole.gradients.steps)
    assert parts.logger.column("train/loss") == pytest.approx(whole.logger.column("train/loss"), rel=ROUNDING)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_batches_without_their_window_are_refused_when_a_step_has_several(
    models: tuple[str, str], tmp_path: Path
) -> None:
    batches = list(Run(tmp_path, models, SkewKL(), 1).fit().data.train_dataloader())
    alone = Run(tmp_path, models, SkewKL(), accumulate=1)
    plain = FixedLoader([type(batch)(**(vars(batch) | {"window": None})) for batch in batches])
    alone.trainer.fit(alone.module, plain)
    assert len(alone.gradients.steps) == len(batches)
    several = Run(tmp_path, models, SkewKL(), accumulate=2)
    with pytest.raises(ConfigError, match="accumulate_grad_batches above 1 needs a loader that says which batches"):
        several.trainer.fit(several.module, plain)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_what_is_no_batch_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    run = Run(tmp_path, models, SkewKL(), accumulate=1)
    loader = FixedLoader(list(Run(tmp_path, models, SkewKL(), 1).fit().data.train_dataloader()))
    with pytest.raises(ConfigError, match=r"The data loader yields dict, not a Batch: use DistillData, or one loader"):
        run.trainer.fit(run.module, {"first": loader, "second": loader})

"""A run that goes on from a checkpoint trains on exactly what was left, whenever the checkpoint was saved."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from distillkit import DistillData, DistillModule, Lora, Sampling
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import SkewKL
from helpers.runs import QUIET, DoubleStudent, DoubleTeacher, UnequalPairs, save_models, write_prompts

PROMPTS, EPOCHS = 10, 2
STEPS = 6
"""Two epochs of steps of 4, 4 and 2 prompts, in micro-batches of 2."""


class StoppedError(Exception):
    """What ends a run."""


class Steps(lightning.Callback):
    """Keeps the gradients of each optimizer step by its number; a step that is taken twice must be the same."""

    def __init__(self) -> None:
        self.gradients: dict[int, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = [p.grad.flatten() for p in pl_module.student.parameters() if p.requires_grad]
        self.gradients[trainer.global_step] = torch.cat(trained)


class SaveAt(lightning.Callback):
    """Saves a checkpoint when a hook is called the n-th time, and ends the run."""

    def __init__(self, path: Path, hook: str, call: int) -> None:
        self.left = call

        def save(trainer: Any, *_: Any, **__: Any) -> None:
            if not trainer.sanity_checking:
                self.left -= 1
                if self.left == 0:
                    trainer.save_checkpoint(path)
                    raise StoppedError

        setattr(self, hook, save)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS)
    write_prompts(root / "val.jsonl", 3, response=True)
    return root


class Run:
    """A run with dropout, so that it depends on the random state at each step."""

    def __init__(self, folder: Path, *callbacks: lightning.Callback, **settings: Any) -> None:
        self.steps = Steps()
        self.module = DistillModule(
            DoubleStudent(str(folder / "student"), lora=Lora(r=2, dropout=0.5)),
            SkewKL(),
            DoubleTeacher(str(folder / "teacher")),
            UnequalPairs(),
            TransformersGenerator(progress=False),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            answers=Sampling(temperature=0.0, max_new_tokens=2),
        )
        val = settings.pop("val", False)
        self.data = DistillData(
            str(folder / "train.jsonl"), str(folder / "val.jsonl") if val else None, batch_size=settings.pop("size", 2)
        )
        options = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, "logger": False}
        options |= {"enable_checkpointing": False, "default_root_dir": folder / "run"}
        self.trainer = lightning.Trainer(**QUIET | options | settings, callbacks=[self.steps, *callbacks])

    def fit(self, path: Path | None = None) -> "Run":
        torch.manual_seed(0)
        self.trainer.fit(self.module, self.data, ckpt_path=path)
        return self

    def validated(self) -> list[dict[str, float]]:
        return self.module.history


def assert_same(parts: list[Run], whole: Run) -> None:
    """The steps of the parts together are those of the whole, and none was left out or taken with other rows."""
    gradients = {step: gradient for part in parts for step, gradient in part.steps.gradients.items()}
    assert gradients.keys() == whole.steps.gradients.keys()
    for step, expected in whole.steps.gradients.items():
        assert torch.equal(gradients[step], expected), f"step {step}"
        assert expected.abs().max() > 1e-4
    state = parts[-1].module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.module.state_dict().items())
    assert parts[-1].trainer.global_step == whole.trainer.global_step
    assert parts[-1].validated() == whole.validated()


MOMENTS = [
    ("on_train_batch_start", 1),  # before anything
    ("on_train_batch_start", 2),  # inside the first step
    ("on_train_batch_start", 3),  # between two steps
    pytest.param("on_before_backward", 4, marks=pytest.mark.slow),
    ("on_before_optimizer_step", 2),
    ("on_train_batch_end", 3),  # inside a step
    pytest.param("on_train_batch_end", 4, marks=pytest.mark.slow),  # after a step
    ("on_train_batch_end", 5),  # the last of the epoch
    pytest.param("on_train_epoch_end", 1, marks=pytest.mark.slow),
    ("on_train_epoch_start", 2),
    ("on_train_batch_start", 6),  # the first of the second epoch
    pytest.param("on_train_batch_end", 6, marks=pytest.mark.slow),
    pytest.param("on_train_batch_end", 9, marks=pytest.mark.slow),
    pytest.param("on_train_batch_end", 10, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    run = Run(folder).fit()
    assert len(run.steps.gradients) == STEPS
    return run


@pytest.mark.parametrize(("hook", "call"), MOMENTS)
def test_a_checkpoint_may_be_saved_at_any_moment(
    hook: str, call: int, folder: Path, whole: Run, tmp_path: Path
) -> None:
    first = Run(folder, SaveAt(tmp_path / "saved.ckpt", hook, call))
    with pytest.raises(StoppedError):
        first.fit()
    assert_same([first, Run(folder).fit(tmp_path / "saved.ckpt")], whole)


VALIDATED = {"val": True, "val_check_interval": 2}
"""Validations after batches 2 and 4 of each epoch: after each step but the last."""

VALIDATION_MOMENTS = [
    ("on_validation_batch_start", 3),  # within a validation: the second batch of the second one
    ("on_validation_end", 1),
    pytest.param("on_validation_start", 2, marks=pytest.mark.slow),
    ("on_train_batch_end", 4),  # a validation is due
    pytest.param("on_train_batch_end", 3, marks=pytest.mark.slow),
    pytest.param("on_train_batch_start", 5, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def whole_validated(folder: Path) -> Run:
    run = Run(folder, **VALIDATED).fit()
    assert [row["step"] for row in run.validated()] == [1, 2, 4, 5]
    return run


@pytest.mark.parametrize(("hook", "call"), VALIDATION_MOMENTS)
def test_a_validation_that_was_due_or_interrupted_is_run_once_and_whole(
    hook: str, call: int, folder: Path, whole_validated: Run, tmp_path: Path
) -> None:
    first = Run(folder, SaveAt(tmp_path / "saved.ckpt", hook, call), **VALIDATED)
    with pytest.raises(StoppedError):
        first.fit()
    assert_same([first, Run(folder, **VALIDATED).fit(tmp_path / "saved.ckpt")], whole_validated)


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_end", 5), ("on_validation_batch_start", 2), ("on_validation_end", 1)]
)
def test_a_validation_at_the_end_of_an_epoch_is_not_lost(hook: str, call: int, folder: Path, tmp_path: Path) -> None:
    every_epoch = {"val": True}
    whole = Run(folder, **every_epoch).fit()
    assert [row["step"] for row in whole.validated()] == [3, 6]
    first = Run(folder, SaveAt(tmp_path / "saved.ckpt", hook, call), **every_epoch)
    with pytest.raises(StoppedError):
        first.fit()
    assert_same([first, Run(folder, **every_epoch).fit(tmp_path / "saved.ckpt")], whole)


@pytest.mark.parametrize("limit", [{"max_steps": 2}, {"max_steps": 4}, {"max_steps": 4, "max_epochs": -1}])
def test_an_epoch_that_a_limit_ended_is_trained_to_its_end(limit: dict[str, int], folder: Path, tmp_path: Path) -> None:
    # A constant learning rate: a run of other length has another schedule.
    whole, first, second = (Run(folder, **settings) for settings in ({}, limit, {}))
    for run in (whole, first, second):
        run.module.lr_schedule, run.module.warmup = "constant", 0.0
    whole.fit()
    first.fit().trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert_same([first, second.fit(tmp_path / "saved.ckpt")], whole)


class Failing(lightning.Callback):
    """Fails in the n-th micro-batch, before its gradient."""

    def __init__(self, call: int) -> None:
        self.left = call

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:.*called without a model", 'ignore:.*ckpt_path="last". is set, but there is no')
@pytest.mark.parametrize("call", [3, 4])
def test_a_checkpoint_on_an_exception_counts_no_batch_that_was_not_trained_on(
    call: int, folder: Path, whole: Run, tmp_path: Path
) -> None:
    first = Run(folder, Failing(call), OnExceptionCheckpoint(tmp_path, "saved"), enable_checkpointing=True)
    with pytest.raises(StoppedError):
        first.fit()
    assert_same([first, Run(folder).fit(tmp_path / "saved.ckpt")], whole)


def test_a_limited_epoch_goes_on_within_its_limit(folder: Path, tmp_path: Path) -> None:
    limited = {"limit_train_batches": 3}
    whole = Run(folder, **limited).fit()
    assert len(whole.steps.gradients) == 4, "steps of two and one micro-batches"
    first = Run(folder, SaveAt(tmp_path / "saved.ckpt", "on_train_batch_end", 3), **limited)
    with pytest.raises(StoppedError):
        first.fit()
    assert_same([first, Run(folder, **limited).fit(tmp_path / "saved.ckpt")], whole)

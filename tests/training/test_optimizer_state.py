"""An optimizer that can't work is refused, and it is said when the weights' rounding swallows the steps."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from distillkit import DistillData, DistillModule, Student
from distillkit.errors import ConfigError
from distillkit.losses import CrossEntropy
from distillkit.training.optimizer_state import check_rounding, make_optimizer
from helpers.runs import QUIET, save_models, write_prompts


def weights(dtype: torch.dtype) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((0.1 * torch.randn(10_000, generator=generator)).to(dtype))


@pytest.mark.parametrize("rate", [2e-5, 2e-4])
def test_the_share_that_is_said_is_that_of_a_step_of_adam(rate: float, caplog: pytest.LogCaptureFixture) -> None:
    parameter = weights(torch.bfloat16)
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0)
    check_rounding(optimizer)
    (message,) = caplog.messages
    share = float(re.search(rf"{rate:g}, changes ([\d.]+) %", message)[1])
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)  # the first step of Adam is the learning rate, whatever the gradient
    optimizer.step()
    assert share == pytest.approx(100 * float((parameter != before).float().mean()), abs=1.0)
    assert 1 < share < 70


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_nothing_is_said_where_steps_count(dtype: torch.dtype, rate: float, caplog: pytest.LogCaptureFixture) -> None:
    parameter = weights(dtype)
    check_rounding(torch.optim.AdamW([parameter], lr=rate))
    assert not caplog.messages


def test_a_run_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_models(tmp_path)
    data = DistillData(write_prompts(tmp_path / "train.jsonl", 2, response=True))
    module = DistillModule(
        Student(str(tmp_path / "student")), CrossEntropy(), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-5)
    )
    trainer = lightning.Trainer(**QUIET, precision="bf16-true", max_epochs=1, logger=False, default_root_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "distillkit"):
        trainer.fit(module, data)
    assert "weights are in bfloat16: a step of the learning rate, 2e-05, changes" in caplog.text
    assert "Use trainer.precision bf16-mixed" in caplog.text


REFUSED = {
    "several evaluations": (torch.optim.LBFGS, r"LBFGS is not supported: it evaluates the loss several times"),
    "sparse": (torch.optim.SparseAdam, r"SparseAdam is not supported: the student's gradients are dense"),
    "matrices alone": (torch.optim.Muon, r"can't be made: Muon only supports 2D parameters"),
    "a rate below 0": (partial(torch.optim.AdamW, lr=-1.0), r"can't be made: Invalid learning rate: -1\.0"),
    "nothing": (lambda parameters: None, r"must return an optimizer of torch, got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_can_not_work_is_refused(name: str) -> None:
    factory, words = REFUSED[name]
    with pytest.raises(ConfigError, match=r"model\.optimizer.* " + words):
        make_optimizer(factory, nn.Linear(2, 2))


def test_a_student_without_a_trained_parameter_is_refused(tmp_path: Path) -> None:
    save_models(tmp_path)
    data = DistillData(write_prompts(tmp_path / "train.jsonl", 2, response=True))
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    module = DistillModule(Student(str(tmp_path / "student")), CrossEntropy())
    lightning.Trainer(**QUIET, **settings).fit(module, data)
    module.freeze()
    with pytest.raises(ConfigError, match=r"no parameter that is trained: all are frozen\. Call module\.unfreeze"):
        lightning.Trainer(**QUIET, **settings).fit(module, data)

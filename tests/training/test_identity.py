"""What differs when a run is resumed takes effect and is said, or is refused; nothing is ignored."""

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Lora, Sampling, Student
from distillkit.curators.single import StudentCurator
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import DistiLLM2, ForwardKL, SkewKL
from distillkit.storage.responses import ResponseStore
from helpers.models import save_tiny
from helpers.runs import QUIET, ROUNDING, DoubleStudent, DoubleTeacher, UnequalPairs, save_models, write_prompts


class Steps(lightning.Callback):
    """Keeps the gradient and the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[int, torch.Tensor] = {}
        self.rates: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for p in pl_module.student.parameters() if p.requires_grad]
        self.gradients[trainer.global_step] = torch.cat(grads)
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identity")
    save_models(root)
    save_tiny(root / "shallow", layers=1, seed=2)
    save_tiny(root / "narrow", layers=2, hidden=16, seed=2)
    save_tiny(root / "other", layers=3, seed=5)
    write_prompts(root / "train.jsonl", 8)
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    (root / "reversed.jsonl").write_text("".join(reversed(lines)))
    (root / "shorter.jsonl").write_text("".join(lines[:-1]))
    return root


def two_groups(rate_of_norms: float) -> Any:
    """An optimizer without weight decay for the norms, which have a learning rate of their own."""

    def make(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
        norms = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": rate_of_norms}
        return torch.optim.AdamW([matrices, norms], lr=lr)

    return make


class Run:
    """Two epochs of two steps of four prompts."""

    def __init__(self, folder: Path, root: Path, **changed: Any) -> None:
        self.steps = Steps()
        rate, decay = changed.pop("lr", 0.01), changed.pop("decay", 0.0)
        optimizer = changed.pop("optimizer", torch.optim.AdamW)
        student = changed.pop("student", None) or DoubleStudent(str(folder / "student"))
        self.module = DistillModule(
            student,
            changed.pop("loss", None) or SkewKL(),
            DoubleTeacher(str(folder / changed.pop("teacher", "teacher"))),
            changed.pop("curator", None) or UnequalPairs(),
            TransformersGenerator(progress=False),
            optimizer=lambda parameters: optimizer(parameters, lr=rate, weight_decay=decay),
            lr_schedule=changed.pop("lr_schedule", "cosine"),
            warmup=changed.pop("warmup", None),
        )
        self.data = DistillData(
            str(folder / changed.pop("train", "train.jsonl")),
            batch_size=changed.pop("size", 2),
            seed=changed.pop("seed", None),
        )
        options = {"max_epochs": 2, "accumulate_grad_batches": 2, "logger": False, "enable_checkpointing": False}
        options |= {"default_root_dir": root}
        self.trainer = lightning.Trainer(**QUIET | options | changed, callbacks=[self.steps])

    def fit(self, path: Path | None = None) -> "Run":
        self.trainer.fit(self.module, self.data, ckpt_path=path)
        return self


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Path]:
    """Checkpoints within the second epoch, and at the end of the first one."""
    paths = {}
    for name, steps in (("within", 3), ("end", 2)):
        paths[name] = folder / f"{name}.ckpt"
        run = Run(folder, folder / name, max_steps=steps).fit()
        run.trainer.save_checkpoint(paths[name])
    return paths


def resume(folder: Path, path: Path, root: Path, caplog: pytest.LogCaptureFixture, **changed: Any) -> tuple[Run, str]:
    """The resumed run, and what it said about differences other than its own length."""
    with caplog.at_level(logging.WARNING, "distillkit"):
        run = Run(folder, root, **changed).fit(path)
    said = [record.getMessage() for record in caplog.records if "max_steps" not in record.getMessage()]
    return run, "\n".join(said)


def test_nothing_is_said_of_a_run_that_is_the_same(
    folder: Path, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in saved.values():
        _, said = resume(folder, path, tmp_path, caplog)
        assert not said


ORDER = {
    "batch size": ({"size": 4}, r"data\.batch_size × devices × .* was 4 and is 8"),
    "accumulation": ({"accumulate_grad_batches": 1}, r"accumulate_grad_batches was 4 and is 2"),
    "order of the data": (
        {"train": "reversed.jsonl"},
        "the training data was 8 prompts with hash .* and is 8 prompts with hash",
    ),
    "shorter data": ({"train": "shorter.jsonl"}, "the training data was 8 prompts .* and is 7 prompts with hash"),
    "seed": ({"seed": 3}, r"data\.seed was 0 and is 3"),
    "limit": ({"limit_train_batches": 3}, r"limit_train_batches was 1\.0 and is 3"),
}


@pytest.mark.parametrize("name", ORDER)
def test_within_an_epoch_other_prompts_are_refused(
    name: str, folder: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    changed, words = ORDER[name]
    with pytest.raises(ConfigError, match=rf"from within epoch 1, and .*{words}.*: prompts would be trained on twice"):
        Run(folder, tmp_path, **changed).fit(saved["within"])


@pytest.mark.parametrize("name", ORDER)
def test_at_the_end_of_an_epoch_they_take_effect(
    name: str, folder: Path, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed, words = ORDER[name]
    run, said = resume(folder, saved["end"], tmp_path, caplog, **changed)
    pattern = words.replace(" was ", ": it was ")
    assert len(run.steps.gradients) >= 1
    assert "Resumed with another value of " in said
    assert "from this epoch on" in said
    assert re.search(pattern, said)


@pytest.mark.parametrize("place", ["within", "end"])
def test_micro_batches_of_another_size_go_on_with_the_same_steps(
    place: str, folder: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    run = Run(folder, tmp_path, size=1, accumulate_grad_batches=4).fit(saved[place])
    same = Run(folder, tmp_path).fit(saved[place])
    assert sorted(run.steps.gradients) == ([3] if place == "within" else [2, 3])
    for step, gradient in run.steps.gradients.items():
        torch.testing.assert_close(gradient, same.steps.gradients[step], rtol=10 * ROUNDING, atol=1e-8)


SAID = {
    "teacher": ({"teacher": "other"}, ["model.teacher.source: it was", "weights of the teacher: it was"]),
    "another loss": ({"loss": ForwardKL()}, ["model.loss: it was SkewKL and is ForwardKL, from step 3 on"]),
    "a setting of the loss": ({"loss": SkewKL(alpha=0.3)}, ["model.loss.alpha: it was 0.1 and is 0.3"]),
    "a loss with a state": ({"loss": DistiLLM2()}, ["model.loss: it was SkewKL and is DistiLLM2", "begin anew: loss."]),
    "curator": ({"curator": UnequalPairs(("student", "teacher"))}, ["model.curator.names: it was"]),
    "schedule": ({"lr_schedule": "linear"}, ["model.lr_schedule: it was cosine and is linear"]),
    "weight decay": ({"decay": 0.5}, ["model.optimizer.weight_decay: it was 0.0 and is 0.5"]),
    "length": ({"max_epochs": 3}, ["trainer.max_epochs: it was 2 and is 3"]),
    "kind of clipping": (
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        ["trainer.gradient_clip_algorithm: it was norm and is value"],
    ),
    "clipping": ({"gradient_clip_val": 1.0}, ["trainer.gradient_clip_val: it was None and is 1.0"]),
}


@pytest.mark.parametrize("name", SAID)
def test_another_setting_takes_effect_and_is_said(
    name: str, folder: Path, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed, words = SAID[name]
    run, said = resume(folder, saved["within"], tmp_path, caplog, **changed)
    assert run.trainer.global_step == (6 if name == "length" else 4)
    assert all(word in said for word in words), said


def test_a_learning_rate_takes_effect_on_its_schedule(
    folder: Path, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Run(folder, tmp_path).fit()
    run, said = resume(folder, saved["end"], tmp_path, caplog, lr=0.1, decay=0.25)
    assert "model.optimizer.lr: it was 0.01 and is 0.1, from step 2 on" in said
    assert whole.steps.rates[3] < whole.steps.rates[2] < 0.01, "a schedule that moves"
    assert run.steps.rates == pytest.approx({step: 10 * whole.steps.rates[step] for step in (2, 3)})
    assert [group["weight_decay"] for group in run.trainer.optimizers[0].param_groups] == [0.25]


def test_each_parameter_group_has_its_settings_of_today(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(folder, tmp_path, optimizer=two_groups(0.02), decay=0.1, max_steps=2).fit().trainer.save_checkpoint(
        path := tmp_path / "groups.ckpt"
    )
    run, said = resume(folder, path, tmp_path, caplog, optimizer=two_groups(0.04), decay=0.3, warmup=0.05)
    assert "model.optimizer.weight_decay of parameter group 0: it was 0.1 and is 0.3" in said
    assert "model.optimizer.lr of parameter group 1: it was 0.02 and is 0.04" in said
    groups = run.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["initial_lr"] for group in groups] == [0.01, 0.04]
    assert run.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.01, 0.04]


def test_parameters_are_selected_for_a_checkpoint_as_for_training(folder: Path, tmp_path: Path) -> None:
    def by_index(parameters: list[torch.nn.Parameter], **settings: float) -> torch.optim.Optimizer:
        chosen = parameters[5]  # a single parameter in the student's place would not do
        return torch.optim.AdamW([{"params": [chosen]}, {"params": [p for p in parameters if p is not chosen]}])

    run = Run(folder, tmp_path, optimizer=by_index, max_steps=2).fit()
    run.trainer.save_checkpoint(tmp_path / "index.ckpt")
    resumed = Run(folder, tmp_path, optimizer=by_index).fit(tmp_path / "index.ckpt")
    assert resumed.trainer.global_step == 4


def test_a_tensor_as_learning_rate_is_that_of_the_factory_in_each_run(folder: Path, tmp_path: Path) -> None:
    def run(rate: float | torch.Tensor, root: Path, path: Path | None = None, steps: int = -1) -> Run:
        optimizer = partial(torch.optim.AdamW, foreach=False)  # a rate that is a tensor has the loop's rounding
        schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        settings: dict[str, Any] = {"optimizer": optimizer, "lr_schedule": schedule, "max_steps": steps}
        return Run(folder, root, lr=rate, **settings).fit(path)

    rate = torch.tensor(0.01)
    run(rate, tmp_path, steps=2).trainer.save_checkpoint(tmp_path / "tensor.ckpt")
    assert float(rate) == pytest.approx(0.01), "a schedule changes the learning rate in place"
    resumed, whole = run(rate, tmp_path, tmp_path / "tensor.ckpt"), run(0.01, tmp_path)
    for step in (2, 3):
        torch.testing.assert_close(resumed.steps.gradients[step], whole.steps.gradients[step], rtol=1e-4, atol=1e-6)


def test_weights_alone_are_no_run_to_go_on_with(folder: Path, tmp_path: Path) -> None:
    Run(folder, tmp_path, max_steps=2).fit().trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ConfigError, match="saved with save_weights_only: it has no state of the optimizer"):
        Run(folder, tmp_path).fit(tmp_path / "weights.ckpt")


def test_an_epoch_that_was_begun_counts_as_one(folder: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is within epoch 1, and trainer\.max_epochs is 1: there is nothing"):
        Run(folder, tmp_path, max_epochs=1).fit(saved["within"])


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(folder: Path, tmp_path: Path) -> None:
    Run(folder, tmp_path, max_epochs=1).fit().trainer.save_checkpoint(tmp_path / "saved.ckpt")
    whole = Run(folder, tmp_path).fit()
    assert whole.steps.rates[2] > 0.004, "where the shorter run has decayed to 0"
    longer = Run(folder, tmp_path).fit(tmp_path / "saved.ckpt")
    assert longer.steps.rates == pytest.approx({step: whole.steps.rates[step] for step in (2, 3)})


REFUSED = {
    "another optimizer": (
        lambda folder: {"optimizer": torch.optim.SGD},
        ConfigError,
        r"model\.optimizer was AdamW and is SGD",
    ),
    "a shallower student": (
        lambda folder: {"student": DoubleStudent(str(folder / "shallow"))},
        ModelError,
        r"has student\.model\.layers\.1\..* which the student lacks: it is from another student",
    ),
    "a narrower student": (
        lambda folder: {"student": DoubleStudent(str(folder / "narrow"))},
        ModelError,
        r"has student\.model\..* with shape .*, here .*: it is from another student",
    ),
    "a deeper student": (
        lambda folder: {"student": DoubleStudent(str(folder / "teacher"))},
        ModelError,
        r"lacks \d+ of the \d+ trained weights, such as student\.model\.layers\.2",
    ),
    "adapters": (
        lambda folder: {"student": DoubleStudent(str(folder / "student"), lora=Lora(r=2))},
        ModelError,
        "trained weights, such as .*lora_A",
    ),
    "fewer epochs": (lambda folder: {"max_epochs": 0}, ConfigError, r"from epoch 1, and trainer\.max_epochs is 0"),
    "fewer steps": (lambda folder: {"max_steps": 1}, ConfigError, r"from step 2, and trainer\.max_steps is 1"),
    "other parameter groups": (
        lambda folder: {"optimizer": two_groups(0.01)},
        ConfigError,
        r"model\.optimizer was with parameter groups of the sizes \[\d+\] and is \[\d+, \d+\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_go_on_is_refused_in_one_line(
    name: str, folder: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    changed, error, words = REFUSED[name]
    with pytest.raises(error, match=words) as caught:
        Run(folder, tmp_path, **changed(folder)).fit(saved["end"])
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_scheduler_are_in_its_state(folder: Path, tmp_path: Path) -> None:
    first, second = (
        Run(folder, tmp_path, lr_schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=size)) for size in (2, 1)
    )
    first.fit().trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(
        ConfigError, match=r"model\.lr_schedule\.step_size was 2 and is 1, but the state of a scheduler"
    ):
        second.fit(tmp_path / "saved.ckpt")


def test_rounds_that_are_numbered_anew_are_generated_anew(folder: Path, tmp_path: Path) -> None:
    """Steps of twice the size have half as many rounds: the first new one has the number of an old one."""

    def run(**changed: Any) -> Run:
        curator = StudentCurator(Sampling(max_new_tokens=3), "step")
        return Run(folder, tmp_path, curator=curator, student=Student(str(folder / "student")), lr=0.2, **changed)

    run(max_epochs=1, accumulate_grad_batches=1).fit().trainer.save_checkpoint(tmp_path / "saved.ckpt")
    run(accumulate_grad_batches=2).fit(tmp_path / "saved.ckpt")
    shards = ResponseStore(tmp_path / "responses").shards()
    weights: dict[int, set[str]] = {}
    for shard in shards:
        weights.setdefault(shard["round"], set()).add(json.dumps(shard["model"]))
    assert sorted(weights) == [0, 1, 2, 3]
    assert len(weights[2]) == len(weights[3]) == 2, "rounds 2 and 3 of both runs, by different weights"

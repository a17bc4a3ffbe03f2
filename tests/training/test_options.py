"""Whatever the options of the trainer, a run is the plain loop that they describe."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit.errors import ConfigError
from helpers.plain_loop import Options, Result, load, plain, run, save
from helpers.runs import on_two_ranks, save_models, write_prompts

PROMPTS = 10
"""Five micro-batches of two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    save_models(root)
    write_prompts(root / "train.jsonl", PROMPTS)
    write_prompts(root / "val.jsonl", 3, response=True)
    return root


TOLERANCE = {"64-true": (2e-7, 1e-12), "32-true": (1e-6, 5e-5), "bf16-mixed": (0.01, 0.05), "bf16-true": (0.01, 0.25)}
"""Relative, of losses and held-out KL, and of the way of the weights. Measured, the largest of all: 6e-8 (a logged
loss is in float32) and 1e-14; 3e-7 and 7e-6; 0.001 and 0.015; 0.002 and 0.14. A wrong factor of a half would be 0.5."""


def differences(ours: Result, theirs: Result, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative differences: of the losses and the held-out KL, each the largest, and of the way of all weights."""
    assert len(ours.losses) == len(theirs.losses) >= 1
    assert [step for step, _ in ours.held_out] == [step for step, _ in theirs.held_out]
    assert ours.weights.keys() == theirs.weights.keys() == start.keys()
    kl = zip([kl for _, kl in ours.held_out], [kl for _, kl in theirs.held_out], strict=True)
    way = torch.cat([(theirs.weights[name].double() - start[name].double()).flatten() for name in start])
    error = torch.cat([(ours.weights[name].double() - theirs.weights[name].double()).flatten() for name in start])
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True)),
        "kl": max((abs(a / b - 1) for a, b in kl), default=0.0),
        "weights": float(error.norm() / way.norm()),
    }


def assert_same(folder: Path, options: Options, ours: Result | None = None) -> None:
    """Compares a run with its plain loop."""
    start = {name: value.clone() for name, value in load(folder / "student", options.precision).state_dict().items()}
    found = differences(ours or run(folder, options), plain(folder, options), start)
    of_figures, of_weights = TOLERANCE[options.precision]
    assert max(found["loss"], found["kl"]) < of_figures, (options, found)
    assert found["weights"] < of_weights, (options, found)


CASES = {
    "plain": Options(),
    "steps of two, the last of an epoch of one": Options(accumulate=2, schedule="linear"),
    "an epoch that is cut within a step": Options(accumulate=2, limit=3, schedule="linear"),
    "an epoch shorter than a step": Options(accumulate=4, limit=2, reduction="token_mean"),
    "a share of an epoch": Options(accumulate=2, limit=0.7, every=2),
    "one batch, over and over": Options(accumulate=4, overfit=1, every=1),
    "two batches, over and over": Options(overfit=2, max_epochs=3, schedule="linear"),
    "an end within an epoch": Options(accumulate=2, max_steps=4, interval=2),
    "an end without a number of epochs": Options(max_epochs=-1, max_steps=6, schedule="linear", interval=3, every=0),
    "clipped by the norm of the whole step": Options(accumulate=3, clip=0.05),
    "clipped by value": Options(accumulate=2, clip=0.003, algorithm="value", reduction="token_mean"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_plain_loop_of_its_options(name: str, folder: Path) -> None:
    assert_same(folder, CASES[name])


OTHER = {
    "validations within steps": ({"num_sanity_val_steps": -1}, Options(2, interval=1)),
    "a loader for each epoch": ({}, Options(2, reload=1, every=1)),
    "anomalies detected": ({"detect_anomaly": True}, Options(2)),
    "deterministic": ({"deterministic": True}, Options(2)),
}
"""Options that change no figure."""


@pytest.mark.parametrize("name", OTHER)
def test_other_options_change_nothing(name: str, folder: Path) -> None:
    more, options = OTHER[name]
    ours = run(folder, options, **more)
    if "num_sanity_val_steps" in more:
        assert ours.held_out.pop(0)[0] == 0
    assert_same(folder, options, ours)


LIMITS = ({}, {"limit": 3}, {"limit": 0.5}, {"overfit": 1})
CLIPS = ({}, {"clip": 0.05}, {"clip": 0.003, "algorithm": "value"})
ENDS = ({"max_epochs": 2}, {"max_epochs": 3, "max_steps": 3}, {"max_epochs": -1, "max_steps": 4})
VALIDATIONS = ({}, {"interval": 1}, {"every": 2}, {"interval": 1.0, "every": 1}, {"interval": 2, "every": 0})


def combinations(**fixed: Any) -> Iterator[Options]:
    """Every limit, clipping and end; the sizes, reductions, schedules and validations take turns."""
    turns = [
        itertools.cycle(({"size": 1}, {"size": 3})),
        itertools.cycle(({}, {}, {"reduction": "token_mean"})),
        itertools.cycle(({"schedule": "linear"}, {"schedule": "linear"}, {}, {})),
        itertools.cycle(VALIDATIONS),
        itertools.cycle(({}, {"reload": 1}, {}, {}, {}, {}, {"reload": 2})),
    ]
    for parts in itertools.product(LIMITS, CLIPS, ENDS):
        settings = itertools.chain(parts, map(next, turns))
        yield replace(Options(**fixed), **{name: value for part in settings for name, value in part.items()})


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_all_combinations_are_their_plain_loops(accumulate: int, folder: Path) -> None:
    cases = list(combinations(accumulate=accumulate))
    assert len(cases) == 36
    for options in cases:
        assert_same(folder, options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_other_precisions_are_the_same_loop_to_rounding(precision: str, accumulate: int, folder: Path) -> None:
    for limit, clip in itertools.product(LIMITS[:2], CLIPS):
        options = Options(accumulate, precision=precision, schedule="linear", **limit, **clip)
        assert_same(folder, options)


@pytest.mark.slow
def test_two_ranks_are_the_plain_loop(folder: Path) -> None:
    cases = [
        Options(2, 2, size=1, world=2, schedule="linear"),
        Options(2, clip=0.05, size=1, world=2, reduction="token_mean", every=1),
        Options(4, 3, size=1, world=2, interval=1, max_steps=2),
        Options(1, overfit=2, size=1, world=2, reload=1, clip=0.003, algorithm="value"),
        Options(2, size=1, world=2, precision="bf16-mixed"),
        Options(2, size=1, world=2, precision="bf16-true"),
    ]
    on_two_ranks(save, str(folder), cases)
    results = torch.load(folder / "ranks.pt")
    for options, result in zip(cases, results, strict=True):
        assert_same(folder, options, Result(**result))


class Changing(lightning.Callback):
    """Another number of micro-batches per step, from the second step on."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            trainer.accumulate_grad_batches = self.accumulate


def test_steps_that_change_under_way_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches is 4, but batch 2 has a `window`"):
        run(folder, Options(accumulate=2), callbacks=[Changing(4)])

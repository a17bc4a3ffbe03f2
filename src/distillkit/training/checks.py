"""Compatibility checks of a run's parts, made before any model is loaded."""

import logging
from collections.abc import Callable, Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from distillkit.curators.base import models_of
from distillkit.curators.best_of_n import BestOfN
from distillkit.curators.filtered import FilteredCurator
from distillkit.curators.paired import DataPairs
from distillkit.curators.single import SampledCurator, run_samplings
from distillkit.errors import ConfigError, PluginError
from distillkit.interfaces import Curator, Generator, Loss, Teacher
from distillkit.losses.cross_entropy import CrossEntropy
from distillkit.losses.token import REJECTED, side_of
from distillkit.models.capabilities import capabilities
from distillkit.models.structure import is_causal_model
from distillkit.models.student import Student
from distillkit.training.lr_schedule import Shape
from distillkit.training.schedule_checks import check_names, check_schedules
from distillkit.types import LossOutput, Prompts, Sampling
from distillkit.types.part import settings_of

_log = logging.getLogger(__name__)


_KINDS: dict[str, type] = {"loss": Loss, "teacher": Teacher, "curator": Curator, "generator": Generator}


_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "answers": (lambda value: isinstance(value, Sampling), "a Sampling, such as Sampling(temperature=0.0)"),
    "optimizer": (
        callable,
        "a class or a function, such as torch.optim.AdamW or lambda parameters: AdamW(parameters, lr=1e-5): it gets "
        "the student's parameters when the run starts",
    ),
    "lr_schedule": (
        lambda value: callable(value) or value in get_args(Shape),
        f"one of {', '.join(get_args(Shape))}, or a class or a function that makes a scheduler",
    ),
}
"""Settings that are no parts: a test of their values, and what they must be."""


def check_kinds(student: object, **parts: object) -> None:
    """Refuses what is no part of a run, such as a model in place of the `Student` that loads it.

    Args:
        student: The student.
        parts: The other parts and settings, by the names of their parameters; None is skipped.

    Raises:
        ConfigError: If one is of another kind.
    """
    if not isinstance(student, Student):
        raise ConfigError(
            f"DistillModule.student must be a Student, got {_described(student)}: a Student names the model and loads "
            "it when the run starts, as Student('./student') does. Save a model that is in memory with save_pretrained."
        )
    for name, part in parts.items():
        if name in _SETTINGS:
            accepts, words = _SETTINGS[name]
            if part is not None and not accepts(part):
                raise ConfigError(f"DistillModule.{name} must be {words}, got {_described(part)}.")
            continue
        kind = _KINDS[name]
        if part is not None and not isinstance(part, kind):
            raise ConfigError(
                f"DistillModule.{name} must be a {kind.__name__}, got {_described(part)}: take one of "
                f"distillkit.{_PACKAGES[name]}, or subclass distillkit.interfaces.{kind.__name__}."
            )


_PACKAGES = {"loss": "losses", "teacher": "teachers", "curator": "curators", "generator": "generators"}


def _described(part: object) -> str:
    return (
        repr(part)
        if isinstance(part, str)
        else f"the class {part.__name__}"
        if isinstance(part, type)
        else type(part).__name__
    )


def check_parts(loss: Loss, teacher: Teacher | None, curator: Curator, generator: Generator, answers: Sampling) -> None:
    """Checks that the parts of a run fit together.

    Args:
        loss: The loss.
        teacher: The teacher, if there is one.
        curator: The curator.
        generator: Generates for student and teacher.
        answers: Sampling of the answers at validation.

    Raises:
        ConfigError: If the loss or the curator needs a teacher and there is none, if the teacher's tokenizer does not
            fit them, or if the generator can't generate for both models or does not support a sampling.
        PluginError: If a schedule has a value that is no 0-dim tensor, or would not move, or not be logged.
    """
    check_schedules(loss, curator)
    for part, needs_teacher in ((loss, loss.needs_teacher), (curator, "teacher" in models_of(curator))):
        if needs_teacher and teacher is None:
            raise ConfigError(f"model.teacher is missing: {type(part).__name__} needs one.")
    sides = {"student": "the student's", "teacher": "of another writer than the student"}
    has_pairs = any(isinstance(part, DataPairs) for part in curator.modules())
    writers = curator.writers | ({"dataset", REJECTED} if has_pairs else set())
    missing = [text for side, text in sides.items() if side not in map(side_of, writers)]
    if loss.contrasts_sides and missing:
        _log.warning(
            "%s contrasts the student's responses with others, and no response of %s is %s: that term is always 0.",
            type(loss).__name__,
            type(curator).__name__,
            missing[0],
        )
    if any(isinstance(part, CrossEntropy) for part in loss.modules()) and _trains_on_own(curator):
        _log.warning(
            "CrossEntropy raises the probability of the student's own responses, good or bad: the student learns to "
            "repeat itself. Use it on responses of the data or the teacher, or select the student's with BestOfN or "
            "FilteredCurator."
        )
    if teacher is not None and not teacher.shares_tokens:
        mismatch = f"{type(teacher).__name__} uses another tokenizer than the student"
        if loss.needs_teacher and loss.compares_tokens:
            raise ConfigError(
                f"{mismatch}, and {type(loss).__name__} compares token by token: use a cross-tokenizer loss."
            )
        if "teacher" in models_of(curator):
            raise ConfigError(
                f"{mismatch}, so {type(curator).__name__} can't train on its responses: use the data's responses, or a "
                "StrongerCurator whose generator is a LocalGenerator of that model."
            )
    if generator.needs_models is not None:
        names = " and ".join(generator.needs_models)
        models = f"{names} together" if names else "a model outside the run"
        raise ConfigError(
            f"model.generator generates for student and teacher, each alone, and a {type(generator).__name__} "
            f"generates with {models}: set it as the generator of a curator."
        )
    for sampling in (answers, *run_samplings(curator)):
        if not isinstance(sampling, Sampling):
            raise ConfigError(
                f"The sampling of {type(curator).__name__} must be a Sampling, got {_described(sampling)}."
            )
        generator.check(sampling)


def _trains_on_own(curator: Curator) -> bool:
    """True if a curator provides responses of the student that none of its parts selects."""
    if isinstance(curator, BestOfN | FilteredCurator):
        return False
    settings = settings_of(curator).values()
    parts = [part for value in settings for part in (value if isinstance(value, list | tuple) else [value])]
    inner = [part for part in parts if isinstance(part, Curator)]
    return any(map(_trains_on_own, inner)) if inner else "student" in curator.writers


def check_overlap(overlap: bool | str, curator: Curator, teacher: Teacher | None) -> bool | str:
    """Returns `overlap`, once the curator and the teacher are known to support it.

    Args:
        overlap: Whether a round is generated while another is trained on, or the device for the copies that generate.
        curator: The curator.
        teacher: The teacher, if there is one.

    Raises:
        ConfigError: If `overlap` is not a valid device, the curator generates only once, or the teacher is unloaded
            while it would have to generate.
    """
    if overlap is False:
        return False
    if isinstance(overlap, str):
        try:
            torch.device(overlap)
        except RuntimeError:
            raise ConfigError(
                f"model.overlap must be true, false or a device such as cuda:1, got {overlap!r}."
            ) from None
    if curator.rounds == "once":
        raise ConfigError(
            f"model.overlap generates a round while another is trained on, and {type(curator).__name__} generates only "
            "once: leave model.overlap out, or change the curator's rounds."
        )
    repeated = (part for part in curator.modules() if isinstance(part, SampledCurator) and part.rounds != "once")
    unloads = teacher is not None and teacher.unloads_between_rounds
    if unloads and any("teacher" in models_of(part) for part in repeated):
        raise ConfigError(
            f"model.overlap has the teacher generate while its scores are read, and {type(teacher).__name__} is "
            "unloaded then: set model.teacher.unload to false."
        )
    return overlap


def check_output(loss: Loss, output: LossOutput, units: Tensor) -> None:
    """Checks that a loss counts units for each component of its total, and that no metric has a name of the run's.

    Args:
        loss: The loss.
        output: What `forward` returned.
        units: `[]` or `[C]`, what `units` returned for the same step.

    Raises:
        PluginError: If the shapes of total and units differ, or a metric has a name that the run itself logs.
    """
    check_names(f"{type(loss).__name__}, as a metric,", output.metrics)
    if output.total.shape != units.shape:
        raise PluginError(
            f"{type(loss).__name__}: `forward` returns a total of shape {list(output.total.shape)} and `units` one of "
            f"shape {list(units.shape)}: both need an entry for each component."
        )


def check_lengths(
    student: nn.Module,
    source: str,
    teacher: Teacher | None,
    prompts: Mapping[str, Prompts],
    curator: Curator,
    answers: Sampling,
) -> None:
    """Compares the longest rows of a run with the positions of its models, before anything is generated or trained.

    Args:
        student: The student's model.
        source: The student's source, for messages.
        teacher: The teacher, if it uses the student's tokenizer.
        prompts: The prompts of each split: `train`, `val`, `test`.
        curator: Provides the rows of the training prompts.
        answers: Sampling of the answers to held-out prompts.

    Raises:
        ModelError: If a model has no position for a row's last token.
    """
    lengths = _longest_rows(prompts, curator, answers)
    models = {f"student {source}": student, "the teacher": None if teacher is None else teacher.scoring_module}
    for name, model in models.items():
        if model is None or not is_causal_model(model):
            continue
        positions = capabilities(model, name).positions
        warnings = {positions.check(length, name, row) for row, length in lengths.items()}
        for warning in sorted(filter(None, warnings)):
            _log.warning("%s", warning)


def _longest_rows(prompts: Mapping[str, Prompts], curator: Curator, answers: Sampling) -> dict[str, int]:
    """Lengths of the longest rows in tokens, by their names in messages."""
    curated = [part.sampling for part in curator.modules() if isinstance(part, SampledCurator)]
    rows: dict[str, int] = {}
    for split, items in prompts.items():
        longest_prompt = max((len(prompt.input_ids) for prompt in items), default=0)
        longest_reference = max((len(prompt.reference_ids) for prompt in items), default=0)
        rows[f"the longest row of data.{split}"] = max(longest_reference, longest_prompt)
        for sampling in curated if split == "train" else [answers]:
            count = sampling.max_new_tokens
            name = f"the longest prompt of data.{split} with {count} new tokens (max_new_tokens)"
            rows[name] = longest_prompt + count
    return rows

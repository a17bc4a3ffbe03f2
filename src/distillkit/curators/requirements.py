"""Whether a run's parts go together, found out before a model is loaded."""

import torch

from distillkit.curators.brought import models_of
from distillkit.curators.single import SampledCurator, sampled_by_the_run
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Loss, Teacher
from distillkit.teachers.cached import CachedTeacher
from distillkit.types import Sampling


def check_parts(loss: Loss, teacher: Teacher | None, curator: Curator, generator: Generator, answers: Sampling) -> None:
    """Compares what parts need with what there is.

    Args:
        loss: The loss.
        teacher: The teacher, if there is one.
        curator: The curator.
        generator: Writes for student and teacher.
        answers: How validation's answers are drawn.

    Raises:
        ConfigError: If loss or curator need a teacher and there is none, or the generator can't write for either model
            or not as it would be asked to.
    """
    for part, needy in ((loss, loss.needs_teacher), (curator, "teacher" in models_of(curator))):
        if needy and teacher is None:
            raise ConfigError(f"model.teacher is missing: {type(part).__name__} needs one.")
    if teacher is not None and not teacher.shares_tokens:
        own = f"{type(teacher).__name__} has tokens of its own"
        if loss.needs_teacher and loss.compares_tokens:
            raise ConfigError(f"{own}, and {type(loss).__name__} compares token by token: use a cross-tokenizer loss.")
        if "teacher" in models_of(curator):
            raise ConfigError(
                f"{own}, and can't write for {type(curator).__name__}: use the data's responses, or a StrongerCurator "
                "whose generator is a LocalGenerator of that model."
            )
    if generator.models is not None:
        others = f"{' and '.join(generator.models)} together" if generator.models else "a model of its own"
        raise ConfigError(
            f"model.generator writes for student and teacher, each alone, and a {type(generator).__name__} writes with "
            f"{others}: set it as the generator of a curator."
        )
    for sampling in (answers, *sampled_by_the_run(curator)):
        generator.check(sampling)


def check_overlap(overlap: bool | str, curator: Curator, teacher: Teacher | None) -> bool | str:
    """`overlap`, where rounds can be written while others are trained on.

    Args:
        overlap: Whether they are, or the device of the copies that write.
        curator: The curator.
        teacher: The teacher, if there is one.

    Raises:
        ConfigError: If it is no device, the curator writes once, or the teacher leaves the memory when it should write.
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
            f"model.overlap writes a round while another is trained on, and {type(curator).__name__} writes once: "
            "leave it out, or give the curator other rounds."
        )
    anew = (part for part in curator.modules() if isinstance(part, SampledCurator) and part.rounds != "once")
    if isinstance(teacher, CachedTeacher) and teacher.unloads and any("teacher" in models_of(part) for part in anew):
        raise ConfigError(
            "model.overlap has the teacher write while its scores are read, and CachedTeacher unloads it: set "
            "model.teacher.unload to false."
        )
    return overlap

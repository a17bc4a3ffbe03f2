"""Whether a run's parts go together, found out before a model is loaded."""

from distillkit.curators.brought import models_of
from distillkit.curators.single import sampled_by_the_run
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Loss, Teacher
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
    if generator.models is not None:
        others = f"{' and '.join(generator.models)} together" if generator.models else "a model of its own"
        raise ConfigError(
            f"model.generator writes for student and teacher, each alone, and a {type(generator).__name__} writes with "
            f"{others}: set it as the generator of a curator."
        )
    for sampling in (answers, *sampled_by_the_run(curator)):
        generator.check(sampling)

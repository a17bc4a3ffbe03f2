"""Generation configs that can be saved: without settings that have no effect, and with every end of turn."""

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distillkit.errors import ModelError
from distillkit.models.checkpoint import quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_ISSUE = re.compile(r"^- `(\w+)`:", re.MULTILINE)


def exportable(model: "PreTrainedModel", end_ids: Sequence[int], name: str) -> tuple["GenerationConfig", list[str]]:
    """A copy of a model's generation config that `save_pretrained` accepts.

    Well-known models combine settings of which one has no effect, such as a temperature with `do_sample: false`.
    transformers loads these, and refuses to save them.

    Args:
        model: A transformers causal language model, which is not changed.
        end_ids: Token ids that end a turn: they become the end tokens of the copy.
        name: The model as the user named it, for the error.

    Returns:
        The copy, and the names of the settings without effect that it lacks.

    Raises:
        ModelError: If the config has a fault that changes what it does.
    """
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = list(end_ids) if len(end_ids) > 1 else end_ids[0]
    config._from_model_config = False  # else transformers would take the end tokens from config.json
    removed: list[str] = []
    while True:
        try:
            with quiet():
                config.validate(strict=True)
            return config, removed
        except ValueError as error:
            issues = [setting for setting in _ISSUE.findall(str(error)) if setting not in removed]
            if not issues:
                raise ModelError(
                    f"{name}: the generation config can't be saved, so the student could not be exported. Correct its "
                    f"generation_config.json. transformers says: {' '.join(str(error).split())}"
                ) from error
        for setting in issues:
            setattr(config, setting, getattr(type(config)(), setting))
        removed += issues

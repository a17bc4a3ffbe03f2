"""The data module of a run, as the training module sees it."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from lightning import Trainer

from distillkit.types import Prompts


@runtime_checkable
class RunData(Protocol):
    """The attributes of distillkit's data module that the training module reads; another data module may lack them."""

    prompts: Mapping[str, Prompts]
    chat: bool


def run_prompts(trainer: Trainer) -> Mapping[str, Prompts]:
    """The prompts of a run by split: `train`, `val`, `test`; empty if another data module is in use."""
    data = _data(trainer)
    return {} if data is None else data.prompts


def uses_chat_template(trainer: Trainer) -> bool:
    """True if the prompts of a run go through the chat template, and if another data module is in use."""
    data = _data(trainer)
    return True if data is None else data.chat


def _data(trainer: Trainer) -> RunData | None:
    data = getattr(trainer, "datamodule", None)  # Lightning sets it only where there is one
    return data if isinstance(data, RunData) else None

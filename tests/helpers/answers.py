"""Short answers, so that a run of any configuration takes a second."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from distillkit.generators import SpeculativeGenerator, TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.types import Prompts, Response, Sampling

Generate = Callable[[Generator, Prompts, Sampling], list[Response]]


def shorten(monkeypatch: pytest.MonkeyPatch, num_tokens: int = 4) -> None:
    """Limits every response of the generators in the process, whatever the configuration says."""
    for kind in (TransformersGenerator, SpeculativeGenerator):
        monkeypatch.setattr(kind, "generate", _shortened(kind.generate, num_tokens))


def _shortened(generate: Generate, num_tokens: int) -> Generate:
    def short(self: Generator, prompts: Prompts, sampling: Sampling) -> list[Response]:
        return generate(self, prompts, replace(sampling, max_new_tokens=num_tokens))

    return short

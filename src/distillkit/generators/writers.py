"""The generators of a run by name, and which weights a round was written with."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distillkit.errors import ConfigError
from distillkit.generators.stored import Ranks, StoredGenerator
from distillkit.interfaces import Generator
from distillkit.models import tokenizers
from distillkit.models.copies import frozen_copy
from distillkit.models.fingerprint import fingerprint
from distillkit.store import ResponseStore


class Writers:
    """A generator for each writer, all of them behind the response store.

    The student moves while a round is trained on, so its fingerprint is taken when the round starts and is part of the
    checkpoint: a run that resumes in the middle of a round reads that round's responses again. It may also move while a
    round is written: `hold` then has copies write.

    Args:
        generator: Template of the generators; each of the run's models has a copy of its own.
        store: Where responses are kept.
        models: Gives each writer's model; None for one that can't write in this process.
        tokenizer: The tokenizer that the models share.
        ranks: The processes that share the writing.
        teacher_fingerprint: Gives the fingerprint of the teacher's weights where it is known without the model; None if
            it never is.
        brought: Generators that the curator brings, by the name of the writer.

    Raises:
        ConfigError: If one of these writes with a model that no run has.
    """

    def __init__(
        self,
        generator: Generator,
        store: ResponseStore,
        models: Mapping[str, Callable[[], nn.Module | None]],
        tokenizer: Any,
        ranks: Ranks,
        teacher_fingerprint: Callable[[], str | None] | None = None,
        brought: Mapping[str, Generator] | None = None,
    ) -> None:
        self.models, self.tokenizer, self.store, self.ranks = models, tokenizer, store, ranks
        self.rounds: dict[int, str] = {}  # the student's fingerprint in round 0 (`once`) and in the last two
        self._device: torch.device | None = None
        self._held: dict[str, nn.Module] = {}
        self._teacher, self._known = "", teacher_fingerprint
        copies = {name: copy.deepcopy(generator) for name in models}
        self.student_now = copies["student"]  # its weights are set before each use: one engine for both is enough
        templates = copies | dict(brought or {})
        for name, own in templates.items():
            if own.models is None and name not in models:
                raise ConfigError(f"{type(own).__name__} writes with a model of the run, and the run has no {name}.")
        self.generators: dict[str, Generator] = {
            name: StoredGenerator(
                name, inner, store, ranks, self._provenance(inner, name), self._now(inner, name), self._refresh(name)
            )
            for name, inner in templates.items()
        }

    def refreshed_student(self) -> Generator:
        """A generator with the student's weights as they are, that stores nothing."""
        self.student_now.refresh(self._live("student"), self.tokenizer)
        return self.student_now

    def hold(self, device: torch.device, student: bool) -> None:
        """From now on models on `device` write, and the student's weights are those of now until this is called again.

        Args:
            device: Where the copies lie; a teacher, which does not move, is copied if it is elsewhere, when it writes.
            student: Whether the student writes.

        Raises:
            ConfigError: If the student is sharded over ranks, which then have to train and write together.
        """
        self._device = device
        if student:
            model = self._live("student")
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise ConfigError("model.overlap copies the student, which is sharded over ranks here: leave it out.")
            self._held["student"] = frozen_copy(model, device, self._held.get("student"))

    def figures(self) -> dict[str, float]:
        """What this process' generators counted in the last round that they wrote: `writer/figure`."""
        counted = {name: own.figures() for name, own in self.generators.items()}
        return {f"{name}/{key}": value for name, own in counted.items() for key, value in own.items()}

    def _refresh(self, name: str) -> Callable[[Generator], None]:
        def refresh(generator: Generator) -> None:
            models = generator.models
            model = self._model(name) if models is None else nn.ModuleDict({own: self._model(own) for own in models})
            generator.refresh(model, self.tokenizer)

        return refresh

    def _model(self, name: str) -> nn.Module:
        if name in self._held:
            return self._held[name]
        model = self._live(name)
        if self._device is None or next(model.parameters()).device == self._device:
            return model
        return self._held.setdefault(name, frozen_copy(model, self._device))

    def _live(self, name: str) -> nn.Module:
        model = self.models[name]() if name in self.models else None
        if model is None:
            raise ConfigError(f"The curator asks the {name} to write, and there is no {name} model in this process.")
        return model

    def _provenance(self, generator: Generator, name: str) -> Callable[[int], str]:
        """What names the weights, and all else that responses depend on, that a round is written with."""
        return lambda number: self._named(generator, name, lambda: self._round_student(number))

    def _now(self, generator: Generator, name: str) -> Callable[[], str]:
        """The same for the weights as they are."""
        return lambda: self._named(generator, name, self._student)

    def _named(self, generator: Generator, name: str, student: Callable[[], str]) -> str:
        models = (name,) if generator.models is None else generator.models
        parts = [student() if own == "student" else self._fixed() for own in models]
        if not models:  # no weights of the run say which tokens its responses are made of
            parts = [self._tokens]
        return "+".join([*parts, *filter(None, [generator.identity()])])

    @cached_property
    def _tokens(self) -> str:
        return f"tokenizer:{tokenizers.fingerprint(self.tokenizer)}"

    def _student(self) -> str:
        return fingerprint(self._model("student"))

    def _round_student(self, number: int) -> str:
        if number not in self.rounds:
            kept = {one: own for one, own in self.rounds.items() if one in (0, number - 1)}
            self.rounds = kept | {number: self._student()}
        return self.rounds[number]

    def _fixed(self) -> str:
        if not self._teacher:
            known = None if self._known is None else self._known()
            self._teacher = known or fingerprint(self._model("teacher"))
        return self._teacher

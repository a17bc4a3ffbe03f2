"""The generators of a run by name, and which weights a round was written with."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from distillkit.errors import ConfigError
from distillkit.generators.stored import Ranks, StoredGenerator
from distillkit.interfaces import Generator
from distillkit.models.fingerprint import fingerprint
from distillkit.store import ResponseStore


class Writers:
    """A generator for the teacher and one for the student, both behind the response store.

    The student moves while a round is trained on, so its fingerprint is taken when the round starts and is part of the
    checkpoint: a run that resumes in the middle of a round reads that round's responses again.

    Args:
        generator: Template of the generators; each writer has a copy of its own.
        store: Where responses are kept.
        models: Gives each writer's model; None for one that can't write in this process.
        tokenizer: The tokenizer that the models share.
        ranks: The processes that share the writing.
        teacher_fingerprint: Gives the fingerprint of the teacher's weights where it is known without the model; None if
            it never is.
    """

    def __init__(
        self,
        generator: Generator,
        store: ResponseStore,
        models: Mapping[str, Callable[[], nn.Module | None]],
        tokenizer: Any,
        ranks: Ranks,
        teacher_fingerprint: Callable[[], str | None] | None = None,
    ) -> None:
        self.models, self.tokenizer, self.store = models, tokenizer, store
        self.rounds: dict[int, str] = {}  # the student's fingerprint in round 0 (`once`) and in the last one
        self._teacher, self._known = "", teacher_fingerprint
        self.generators: dict[str, Generator] = {}
        for name in models:
            own, now = (self._round_student, self._student) if name == "student" else (self._fixed, self._fixed_now)
            inner = copy.deepcopy(generator)
            self.generators[name] = StoredGenerator(name, inner, store, ranks, own, now, self._refresh(name))
        self.student_now = copy.deepcopy(generator)

    def refreshed_student(self) -> Generator:
        """A generator with the student's weights as they are, that stores nothing."""
        self._refresh("student")(self.student_now)
        return self.student_now

    def _refresh(self, name: str) -> Callable[[Generator], None]:
        return lambda generator: generator.refresh(self._model(name), self.tokenizer)

    def _model(self, name: str) -> nn.Module:
        model = self.models[name]()
        if model is None:
            raise ConfigError(f"The curator asks the {name} to write, and there is no {name} model in this process.")
        return model

    def _student(self) -> str:
        return fingerprint(self._model("student"))

    def _round_student(self, number: int) -> str:
        if number not in self.rounds:
            self.rounds = {kept: own for kept, own in self.rounds.items() if kept == 0} | {number: self._student()}
        return self.rounds[number]

    def _fixed_now(self) -> str:
        if not self._teacher:
            known = None if self._known is None else self._known()
            self._teacher = known or fingerprint(self._model("teacher"))
        return self._teacher

    def _fixed(self, number: int) -> str:
        return self._fixed_now()

"""The generators of a run by name, and the weights that each round was generated with."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distillkit.errors import ConfigError
from distillkit.interfaces import Generator
from distillkit.models import tokenizers
from distillkit.models.copies import frozen_copy
from distillkit.models.fingerprint import fingerprint
from distillkit.rollouts.stored import Ranks, StoredGenerator
from distillkit.storage.responses import ResponseStore
from distillkit.types import Tokenizer


class GeneratorPool:
    """One generator per writer, all of them behind the response store.

    The student changes while a round is trained on, so its fingerprint is taken when the round starts and is part of
    the checkpoint: a run that resumes in the middle of a round reads that round's responses again. The student may also
    change while a round is generated: after `snapshot_student`, copies generate.

    Args:
        generator: Template of the generators; each model of the run gets a copy of it.
        store: The response store.
        models: Returns each writer's model; None if a writer has no model in this process.
        tokenizer: The tokenizer that the models share.
        ranks: The processes that share the work.
        teacher_fingerprint: Returns the fingerprint of the teacher's weights if it is known without the model, else
            None; None if it is never known.
        curator_generators: Generators that the curator provides, by the name of the writer.
        rendering: Name of the way in which messages become tokens, for the provenance; empty if it is always the same.

    Raises:
        ConfigError: If one of these needs a model that the run does not have.
    """

    def __init__(
        self,
        generator: Generator,
        store: ResponseStore,
        models: Mapping[str, Callable[[], nn.Module | None]],
        tokenizer: Tokenizer,
        ranks: Ranks,
        teacher_fingerprint: Callable[[], str | None] | None = None,
        curator_generators: Mapping[str, Generator] | None = None,
        rendering: str = "",
    ) -> None:
        self.rendering = rendering
        self.models, self.tokenizer, self.store, self.ranks = models, tokenizer, store, ranks
        self.round_fingerprints: dict[int, str] = {}  # the student's, in round 0 (`once`) and in the last two rounds
        self._device: torch.device | None = None
        self._snapshots: dict[str, nn.Module] = {}
        self._teacher_fingerprint, self._read_teacher_fingerprint = "", teacher_fingerprint
        copies = {name: copy.deepcopy(generator) for name in models}
        self.student_generator = copies["student"]  # refreshed before each use: one engine serves rounds and validation
        templates = copies | dict(curator_generators or {})
        for name, template in templates.items():
            if template.needs_models is None and name not in models:
                raise ConfigError(
                    f"{type(template).__name__} generates with a model of the run, but the run has no {name}. Use a "
                    "generator with a separate model, such as LocalGenerator or ServerGenerator."
                )
        self.generators: dict[str, StoredGenerator] = {
            name: StoredGenerator(
                name,
                inner,
                store,
                ranks,
                self._round_provenance(inner, name),
                self._current_provenance(inner, name),
                self._refresh(name),
            )
            for name, inner in templates.items()
        }

    def refreshed_student(self) -> Generator:
        """Returns a generator with the student's current weights that does not use the store."""
        self.student_generator.refresh(self._live("student"), self.tokenizer)
        return self.student_generator

    def snapshot_student(self, device: torch.device, student: bool) -> None:
        """Generates on `device` from now on, with the student's current weights until the next call.

        Args:
            device: Device of the copies. A teacher, whose weights do not change, is copied when it generates, unless it
                is on this device already.
            student: Whether the student generates.

        Raises:
            ConfigError: If the student is sharded over ranks, which then have to train and generate together.
        """
        self._device = device
        if student:
            model = self._live("student")
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise ConfigError(
                    "model.overlap copies the student, which is sharded over ranks in this run. Remove model.overlap."
                )
            self._snapshots["student"] = frozen_copy(model, device, self._snapshots.get("student"))

    def metrics(self) -> dict[str, float]:
        """Metrics of this process' generators for the last round that they generated: `writer/metric`."""
        by_writer = {writer: generator.metrics() for writer, generator in self.generators.items()}
        return {f"{writer}/{name}": value for writer, metrics in by_writer.items() for name, value in metrics.items()}

    def _refresh(self, name: str) -> Callable[[Generator], None]:
        def refresh(generator: Generator) -> None:
            needed = generator.needs_models
            if needed is None:
                generator.refresh(self._model(name), self.tokenizer)
            else:
                models = nn.ModuleDict({model_name: self._model(model_name) for model_name in needed})
                generator.refresh(models, self.tokenizer)

        return refresh

    def _model(self, name: str) -> nn.Module:
        if name in self._snapshots:
            return self._snapshots[name]
        model = self._live(name)
        if self._device is None or next(model.parameters()).device == self._device:
            return model
        return self._snapshots.setdefault(name, frozen_copy(model, self._device))

    def _live(self, name: str) -> nn.Module:
        model = self.models[name]() if name in self.models else None
        if model is None:
            raise ConfigError(
                f"The curator requests responses of the {name}, but this process has no {name} model. Set one, or give "
                "the curator a generator with a separate model."
            )
        return model

    def _round_provenance(self, generator: Generator, name: str) -> Callable[[int], str]:
        """Names the weights that a round is generated with, and everything else that its responses depend on."""
        return lambda round_index: self._provenance(generator, name, lambda: self._round_fingerprint(round_index))

    def _current_provenance(self, generator: Generator, name: str) -> Callable[[], str]:
        """The same for the current weights."""
        return lambda: self._provenance(generator, name, self._student_fingerprint)

    def _provenance(self, generator: Generator, name: str, student_fingerprint: Callable[[], str]) -> str:
        models = (name,) if generator.needs_models is None else generator.needs_models
        parts = [student_fingerprint() if model == "student" else self._fixed_fingerprint() for model in models]
        if not models:  # without weights of the run, only the tokenizer determines the tokens of the responses
            parts = [self._tokenizer_fingerprint]
        return "+".join([*parts, *filter(None, [self.rendering, generator.identity()])])

    @cached_property
    def _tokenizer_fingerprint(self) -> str:
        return f"tokenizer:{tokenizers.fingerprint(self.tokenizer)}"

    def _student_fingerprint(self) -> str:
        return fingerprint(self._model("student"))

    def _round_fingerprint(self, round_index: int) -> str:
        if round_index not in self.round_fingerprints:
            retained = {
                earlier: value for earlier, value in self.round_fingerprints.items() if earlier in (0, round_index - 1)
            }
            self.round_fingerprints = retained | {round_index: self._student_fingerprint()}
        return self.round_fingerprints[round_index]

    def _fixed_fingerprint(self) -> str:
        """The teacher's fingerprint, computed once."""
        if not self._teacher_fingerprint:
            value = None if self._read_teacher_fingerprint is None else self._read_teacher_fingerprint()
            self._teacher_fingerprint = value or fingerprint(self._model("teacher"))
        return self._teacher_fingerprint

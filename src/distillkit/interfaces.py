"""The abstract classes that a plugin may subclass: signatures and promises only."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillkit.types import Batch, LossOutput, Progress, Prompts, Response, Row, Sampling, Scores, Summary


class Schedule(nn.Module, ABC):
    """A number that moves with training; its clock is the optimizer step.

    State belongs into buffers: they are saved in the checkpoint and keep their dtype in half-precision runs.
    """

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The number now: 0-dim, without gradient."""

    @abstractmethod
    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves to `progress`. Called before the first step with no metrics, after each optimizer step and validation.

        Args:
            progress: Steps done and steps in all.
            metrics: What the loss reported in the step that ended, over all ranks; after a validation its figures
                alone, as `val/kl`, `val/nll`, `val/acceptance` and `val/rouge_l`.
        """

    def for_rows(self, gap: Tensor) -> Tensor:
        """The number for each row.

        Args:
            gap: `[R]` how much likelier a response is to its writer's model than to the other, in [-1, 1].

        Returns:
            `[R]` numbers without gradient.
        """
        return self.value.to(gap).expand_as(gap)

    def _apply(self, fn: Any, recurse: bool = True) -> "Schedule":
        # A run in bf16 casts every float buffer of the module: schedules move with it, and keep their precision.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self


class Loss(nn.Module, ABC):
    """Compares two models' scores of a batch. It returns a sum and a count, never a mean."""

    needs_teacher: ClassVar[bool] = True
    """False if `teacher` is never read: no teacher is then needed for training."""

    compares_tokens: ClassVar[bool] = True
    """False if it does without the same number standing for the same token of both models."""

    @abstractmethod
    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            student: Scores with a graph.
            teacher: Scores without one; None only if `needs_teacher` is False.
            batch: The rows that were scored.

        Returns:
            Totals with a graph also when no position is selected, `units(batch)`, and metrics.
        """

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """The number of units that `forward` sums over, `[]` or `[C]` float64 on the CPU, known without a model."""

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves the schedules among the direct parts of this loss; called as `Schedule.update` is."""
        for child in self.children():
            if isinstance(child, Schedule | Loss):
                child.update(progress, metrics)


class Generator(ABC):
    """Continues prompts with a model."""

    models: tuple[str, ...] | None = None
    """The run's models that it writes with, such as `student` and `teacher`; `()` for none, where it has its own; None
    for the one that its writer is named after."""

    responses_per_shard: int | None = None
    """Responses that are asked for and stored at once; None leaves it to the store."""

    @abstractmethod
    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the weights that `model` has now. Called before it writes, in each round anew.

        Args:
            model: A transformers causal language model; where `models` names some, an `nn.ModuleDict` of those.
            tokenizer: The run's tokenizer.
        """

    def identity(self) -> str | None:
        """Names what its responses depend on besides the run's models and the sampling; None if nothing.

        It is part of a response's provenance: a server's model, a file's content, settings of its own.
        """
        return None

    def figures(self) -> Mapping[str, float]:
        """What it has counted since `refresh`, to be logged; empty if nothing."""
        return {}

    def release(self) -> None:  # noqa: B027 - most generators write with a model that stays
        """Told that a round is written: frees what only writing needs. `refresh` comes before it writes again."""

    def check(self, sampling: Sampling) -> None:  # noqa: B027 - most generators draw in every way
        """Refuses a sampling that it can't draw with; asked before any model is loaded.

        Raises:
            ConfigError: If it can't.
        """

    @abstractmethod
    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order. A response depends on its own seed, not on its neighbours."""


class Curator(nn.Module, ABC):
    """Turns prompts into rows with responses, each marked with its writer."""

    needs_reference: bool = False
    """True if every prompt must come with a response of its own."""

    @property
    @abstractmethod
    def rounds(self) -> "str | int":
        """How long a round lasts: `once`, `epoch`, or a number of optimizer steps."""

    @property
    @abstractmethod
    def writers(self) -> frozenset[str]:
        """The generators that `curate` asks for by name, such as `teacher` and `student`."""

    def brings(self) -> Mapping[str, Generator]:
        """Generators of its own, by the name of the writer; for all others the run's generator writes."""
        return {}

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves the schedules and curators among its direct parts; called as `Schedule.update` is."""
        for child in self.children():
            if isinstance(child, Schedule | Curator):
                child.update(progress, metrics)

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Writes what is written once, for all prompts of the run. Called before the first round."""

    def begin(self, round_number: int) -> None:
        """Told that a round is about to be curated: reads what moves with training, such as a schedule's number.

        `curate` may then run in a thread of its own, while the round before is trained on. Called in the thread that
        trains, also for a round that is curated again; hands the number on to the curators among its direct parts.
        """
        for child in self.children():
            if isinstance(child, Curator):
                child.begin(round_number)

    @abstractmethod
    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """Rows for the prompts of one round.

        Args:
            prompts: The round's prompts.
            generators: A generator per name in `writers`, holding the weights of the round's start.

        Returns:
            As many rows for each prompt as for every other, those of one prompt together, in the prompts' order. A row
            that is not to be trained on has an empty `response_mask` (False everywhere). A row may stand for another
            prompt than the one whose place it takes (replay).
        """


class Teacher(ABC):
    """Scores positions without a gradient. Not a module: it must not land in the student's checkpoint."""

    shares_tokens: bool = True
    """False if it reads and scores text in tokens of its own: only a loss without `compares_tokens` learns from it, it
    writes no responses, and held-out figures are taken on the data's."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Loads what it needs onto `device`; does nothing where that is loaded."""

    def unload(self) -> None:  # noqa: B027 - most teachers stay
        """Frees the memory of its model; the next `setup` loads it again."""

    def meet(self, tokenizer: Any, prompts: Prompts) -> None:  # noqa: B027 - one with the same tokens needs neither
        """Told the student's tokenizer and the run's prompts, before a model is loaded, if it shares no tokens."""

    def prepare(self, rows: Sequence[Row]) -> None:  # noqa: B027 - most teachers have nothing to prepare
        """Told the rows of a round before the first of them is trained on; every rank is told the same rows."""

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, loadable without the model."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Width of the teacher's logits. Known after `setup`."""

    @abstractmethod
    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens, those that both models share."""

    def identity(self) -> str | None:
        """Names its weights, as far as they are known without being loaded; None where they are not."""
        return None

    def fingerprint(self) -> str | None:
        """A short name for exactly these weights, where it is known without the model; None where it is not."""
        return None

    @property
    def model(self) -> nn.Module | None:
        """The model in this process that a generator may continue prompts with; None if there is none."""
        return None

    @property
    def scorer(self) -> nn.Module | None:
        """What runs in this process when it scores: the model, its output embedding alone, or nothing."""
        return self.model


class Verifier(ABC):
    """Judges a response."""

    needs_reference: bool = False
    """True if every prompt must come with a response of its own, which is read as `Prompt.reference`."""

    def check(self, prompts: Prompts) -> None:  # noqa: B027 - most verifiers can judge responses to any prompt
        """Refuses prompts whose responses it can't judge. Called before responses to them are written."""

    @abstractmethod
    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """One number per response, larger is better; exact checks give 0 or 1."""

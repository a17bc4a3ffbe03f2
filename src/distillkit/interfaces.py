"""Abstract base classes for plugins: signatures and contracts, without implementations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from distillkit.types import (
    Batch,
    LossOutput,
    Progress,
    Prompts,
    Record,
    Response,
    Row,
    Sampling,
    Scores,
    Summary,
    Tokenizer,
)
from distillkit.types.part import Part

__all__ = [
    "Curator",
    "Generator",
    "Loss",
    "PromptSource",
    "ResponseFilter",
    "Schedule",
    "Teacher",
    "Verifier",
]


class Schedule(Part, nn.Module, ABC):
    """A value that changes during training, once per optimizer step.

    Store its state in buffers: they are saved in the checkpoint and keep their dtype in half-precision runs.
    """

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The current value, 0-dim, without gradient."""

    @abstractmethod
    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the value. Called before the first step with no metrics, after each optimizer step and validation.

        Args:
            progress: Completed and total optimizer steps.
            metrics: Metrics of the loss in the last step, over all ranks; after a validation only the validation
                metrics, such as `val/kl`, `val/nll`, `val/acceptance` and `val/rouge_l`.
        """

    def metrics(self) -> Mapping[str, Tensor]:
        """Returns what is logged besides `value`, by name, 0-dim; empty if there is nothing."""
        return {}

    def for_rows(self, gap: Tensor) -> Tensor:
        """Returns the value for each row.

        Args:
            gap: `[R]` likelihood of each response under the model that generated it, minus that under the other model,
                in [-1, 1].

        Returns:
            `[R]` values without gradient.
        """
        return self.value.to(gap).expand_as(gap)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Schedule":
        # A run in bf16 casts every float buffer of the module: a schedule changes device with it, but not precision.
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in buffers.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self


def _schedules(part: nn.Module, nested: type["Loss | Curator"]) -> dict[str, Schedule]:
    """The schedules among the direct children of a part by attribute name; those of nested parts are prefixed."""
    schedules: dict[str, Schedule] = {}
    for name, child in part.named_children():
        if isinstance(child, Schedule):
            schedules[name] = child
        elif isinstance(child, nested):
            schedules |= {f"{name}/{key}": schedule for key, schedule in child.schedules().items()}
    return schedules


class Loss(Part, nn.Module, ABC):
    """Compares the scores of two models on a batch. It returns a sum and a count, never a mean."""

    needs_teacher: ClassVar[bool] = True
    """False if `teacher` is never used: training then needs no teacher."""

    contrasts_sides: ClassVar[bool] = False
    """True if the student's own responses are treated differently from all others (`losses.side_of`): a run whose
    curator has none of either side is warned of, and no `val/loss` is taken on the data's held-out answers."""

    compares_tokens: ClassVar[bool] = True
    """False if the two models may have different tokenizers: the loss does not compare probabilities token by token."""

    @abstractmethod
    def forward(self, student: Scores, teacher: Scores | None, batch: Batch) -> LossOutput:
        """Computes the loss of one micro-batch.

        Args:
            student: Scores with a graph.
            teacher: Scores without a graph; None only if `needs_teacher` is False.
            batch: The scored rows.

        Returns:
            Totals, `units(batch)`, and metrics. The totals have a graph even if no position is selected.
        """

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """Returns the number of units that `forward` sums over, `[]` or `[C]` float64 on the CPU; needs no model."""

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the schedules and losses among the direct children; called when `Schedule.update` is."""
        for child in self.children():
            if isinstance(child, Schedule | Loss):
                child.update(progress, metrics)

    def schedules(self) -> Mapping[str, Schedule]:
        """Returns the schedules by the name under which their values are logged: `q` as `train/q`.

        These are the schedules and losses among the direct children, by the names of their attributes. A metric of
        `forward` with the name of a schedule is logged in place of `Schedule.value`.
        """
        return _schedules(self, Loss)


class Generator(Part, ABC):
    """Generates responses to prompts."""

    needs_models: tuple[str, ...] | None = None
    """Names of the run's models that it generates with, such as `student` and `teacher`; `()` if it needs none of them.
    None means the one model that has the name of the writer."""

    progress: bool = True
    """False if no progress bar is shown while it generates."""

    responses_per_shard: int | None = None
    """Number of responses that are requested and stored at a time; None uses the default of the store."""

    @abstractmethod
    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Loads the current weights of `model`. Called in each round, before anything is generated.

        Args:
            model: A transformers causal language model; an `nn.ModuleDict` if `needs_models` is a tuple of names.
            tokenizer: The run's tokenizer.
        """

    def identity(self) -> str | None:
        """Returns what the responses depend on besides the run's models and the sampling, or None.

        It is part of a response's provenance. Examples: a server's model, a file's content, the generator's settings.
        """
        return None

    def metrics(self) -> Mapping[str, float]:
        """Returns metrics to log, counted since `refresh`; empty if there are none."""
        return {}

    def description(self) -> str:
        """Returns what the store notes as the generator of its responses, for information: its class."""
        return type(self).__name__

    def release(self) -> None:
        """Called after a round has been generated: frees memory. `refresh` is called before the next generation."""

    def check(self, sampling: Sampling) -> None:
        """Checks that the sampling settings are supported. Called before any model is loaded.

        Raises:
            ConfigError: If a setting is not supported.
        """

    @abstractmethod
    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Returns one response per prompt, in order. A response depends on its seed, not on the rest of the batch."""


class PromptSource(Part, ABC):
    """Provides prompts, with or without responses."""

    path: str
    """Name of the source in messages and in the model card, such as the path of a file."""

    on_error: Literal["stop", "skip"] | None = None
    """Treatment of a record that can't be encoded: `stop` stops, `skip` leaves it out and counts it; None is that of
    the data (`data.on_error`)."""

    def check(self) -> None:
        """Checks the settings without reading or generating anything. Called before `records`.

        Raises:
            DistillKitError: If the source can't be read.
        """

    @abstractmethod
    def records(self) -> list[Record]:
        """Returns the conversations, in a fixed order, the same in every process and in a resumed run."""


class ResponseFilter(Part, ABC):
    """Decides which responses are excluded from training."""

    reason: str
    """The word for a refused response in the log, such as `empty`."""

    @abstractmethod
    def refuses(self, row: Row) -> bool:
        """True if the row's response must not be trained on."""


class Curator(Part, nn.Module, ABC):
    """Turns prompts into training rows: a prompt, a response, and the writer that it comes from."""

    needs_reference: bool = False
    """True if every prompt must have a reference response in the data set."""

    @property
    @abstractmethod
    def rounds(self) -> "str | int":
        """Length of a round: `once`, `epoch`, or a number of optimizer steps."""

    @property
    @abstractmethod
    def writers(self) -> frozenset[str]:
        """Names of the generators that `curate` uses, such as `teacher` and `student`."""

    def own_generators(self) -> Mapping[str, Generator]:
        """Returns the curator's own generators by writer name; all other writers use the run's generator."""
        return {}

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the schedules and curators among the direct children; called when `Schedule.update` is."""
        for child in self.children():
            if isinstance(child, Schedule | Curator):
                child.update(progress, metrics)

    def schedules(self) -> Mapping[str, Schedule]:
        """Returns the schedules by the name under which their values are logged: `q` as `train/curator/q`.

        These are the schedules and curators among the direct children, by the names of their attributes.
        """
        return _schedules(self, Curator)

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Generates what is needed once for all prompts of the run. Called before the first round."""

    def on_round_start(self, round_index: int) -> None:
        """Called before a round is curated: reads values that change during training, such as schedules.

        `curate` may run in a separate thread while the previous round is trained on. This method is called in the
        training thread, also if a round is curated again, and calls the curators among the direct children.
        """
        for child in self.children():
            if isinstance(child, Curator):
                child.on_round_start(round_index)

    @abstractmethod
    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """Returns the rows for the prompts of one round.

        Args:
            prompts: The round's prompts.
            generators: A generator for each name in `writers`, with the weights at the start of the round.

        Returns:
            The same number of rows for each prompt, grouped by prompt, in the order of the prompts. A row that must not
            be trained on has a `response_mask` that is False everywhere. A row may belong to another prompt than the
            one at its index (replay).
        """


class Teacher(Part, ABC):
    """Scores positions without a gradient. Not a module: it must not be saved in the student's checkpoint."""

    shares_tokens: bool = True
    """False if its tokenizer differs from the student's. Then the loss must have `compares_tokens = False`, the teacher
    generates no responses, and validation uses the data set's responses."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Loads the teacher onto `device`; does nothing if it is there already."""

    def unload(self) -> None:
        """Frees the memory of the model; the next `setup` loads it again."""

    @property
    def unloads_between_rounds(self) -> bool:
        """True if the model is unloaded after the rows of a round have been prepared."""
        return False

    def prepare_alignment(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        """Prepares the alignment of tokens if `shares_tokens` is False. Called before a model is loaded.

        Args:
            tokenizer: The student's tokenizer.
            prompts: All prompts of the run.
        """

    def prepare(self, rows: Sequence[Row]) -> None:
        """Called with the rows of a round, the same on every rank, before the first of them is trained on."""

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """Returns the scores of the batch's N response positions."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Returns the teacher's tokenizer, which is available before `setup`."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Width of the teacher's logits, available after `setup`."""

    @abstractmethod
    def limit_vocab(self, size: int) -> None:
        """Limits the scores to the first `size` tokens, which both models share."""

    @property
    def display_name(self) -> str:
        """Name of the teacher in messages."""
        return type(self).__name__

    def identity(self) -> str | None:
        """Returns a name of the weights that is available without loading them, or None."""
        return None

    def fingerprint(self) -> str | None:
        """Returns a short, unique name of the weights that is available without loading them, or None."""
        return None

    @property
    def model(self) -> nn.Module | None:
        """The model in this process that a generator may use; None if there is none."""
        return None

    @property
    def scoring_module(self) -> nn.Module | None:
        """The module that runs in this process when the teacher scores: the model, its output embedding, or None."""
        return self.model


class Verifier(Part, ABC):
    """Grades responses."""

    needs_reference: bool = False
    """True if every prompt must have a reference response, available as `Prompt.reference`."""

    def check(self, prompts: Prompts) -> None:
        """Raises an error for prompts that are not supported. Called before responses are generated."""

    @abstractmethod
    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """Returns one score per response, larger is better; exact checks return 0 or 1."""

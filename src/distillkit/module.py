"""The one LightningModule: curate, score with the student, score with the teacher, compare."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial, partialmethod
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from distillkit import resume
from distillkit.curators.overlap import Rounds
from distillkit.curators.requirements import check_overlap, check_parts
from distillkit.curators.single import DatasetCurator, TeacherCurator
from distillkit.data.window import step_window
from distillkit.errors import ConfigError
from distillkit.evaluation.heldout import HeldOut
from distillkit.evaluation.meter import StepMeter, flatten
from distillkit.evaluation.validation import Validation
from distillkit.generators.in_process import TransformersGenerator
from distillkit.generators.stored import Ranks
from distillkit.generators.writers import Writers
from distillkit.interfaces import Curator, Generator, Loss, Teacher, Verifier
from distillkit.models.scoring import check_head, score, share_vocab, side_by_side
from distillkit.models.student import Student
from distillkit.models.tokenizers import require_same
from distillkit.optimization import Shape, with_schedule
from distillkit.store import ResponseStore
from distillkit.types import Batch, Progress, Prompts, Row, Sampling, Scores, Slicing, Summary


class DistillModule(LightningModule):
    """Trains a student on responses that a curator provides, with a loss that compares it to a teacher.

    Args:
        student: The model that is trained.
        loss: Compares the two models on a batch.
        teacher: The model that is learnt from; None for losses and curators that need none.
        curator: Who writes the responses; None takes those of the data.
        generator: Continues prompts for the curator and for validation; None is the one in process.
        optimizer: The optimizer, given the student's trainable parameters.
        lr_schedule: Shape of the learning rate after the warm-up.
        warmup: Share of the optimizer steps over which the learning rate grows from 0, in [0, 1).
        answers: How validation's answers are drawn, by teacher and student; None is greedy, at most 128 tokens.
        store: Folder of the response store; None is `responses` in the run's folder.
        slicing: How the loss is run over positions; None is as `Slicing` has it.
        overlap: Whether a round is written while the one before is trained on, by a copy of the student that lags by
            that round: False, True on the device that trains, or another device for the copy, such as `cuda:1`.
        metrics: Judges of the student's answers to held-out prompts, each by the name under which it is logged.

    Raises:
        ConfigError: If the loss or the curator needs a teacher and there is none, the generator can't write for either
            model or draw as it would be asked to, or a number is out of range.
    """

    def __init__(
        self,
        student: Student,
        loss: Loss,
        teacher: Teacher | None = None,
        curator: Curator | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Shape = "cosine",
        warmup: float = 0.05,
        answers: Sampling | None = None,
        store: str | None = None,
        slicing: Slicing | None = None,
        overlap: bool | str = False,
        metrics: dict[str, Verifier] | None = None,
    ) -> None:
        super().__init__()
        self.curator = curator or DatasetCurator()
        if not 0 <= warmup < 1:
            raise ConfigError(f"model.warmup must lie in [0, 1), a share of the optimizer steps, got {warmup}.")
        self.loader, self.loss, self.teacher, self.slicing = student, loss, teacher, slicing or Slicing()
        self.generator = generator or TransformersGenerator()
        self.optimizer, self.lr_schedule, self.warmup, self.store = optimizer, lr_schedule, warmup, store
        self.student: Any = None  # a transformers model, once `configure_model` has run
        self.held_out, self.meter = HeldOut(metrics), StepMeter()
        self.validation = Validation(self.held_out, answers or Sampling(temperature=0.0, max_new_tokens=128))
        self.answers, self.history = self.validation.sampling, self.validation.history
        check_parts(loss, teacher, self.curator, self.generator, self.answers)
        self.overlap = check_overlap(overlap, self.curator, teacher)
        self._saved: dict[str, Any] = {}
        self._step: dict[str, Summary] = {}
        self._units, self._vocab = torch.ones(1), 0
        self.share_done: Callable[[int], float] | None = None  # of a run that a budget ends, after so many steps
        self.shard = (0, 1)  # which part of the responses this run writes, of how many

    @property
    def speaker(self) -> Teacher | None:
        """The teacher, if it reads and writes the student's tokens."""
        return self.teacher if self.teacher is not None and self.teacher.shares_tokens else None

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self.loader.tokenizer()

    def prepare_data(self) -> None:
        """Fetches and converts the models' files, once per machine."""
        self.loader.prepare()

    def setup(self, stage: str) -> None:
        """Compares the tokenizers before any model is loaded."""
        if self.speaker is not None:
            require_same(self.tokenizer, self.speaker.tokenizer(), "student", "teacher")
        elif self.teacher is not None:
            prompts = getattr(getattr(self.trainer, "datamodule", None), "prompts", {})
            self.teacher.meet(self.tokenizer, prompts.get("train", Prompts(())))

    def configure_model(self) -> None:
        """Loads both models and cuts them to the tokens that they share."""
        if self.student is not None:
            return
        self.student = self.loader.load()
        check_head(self.student, f"student {self.loader.source}")
        if self.teacher is not None:
            self.teacher.setup(self.trainer.strategy.root_device)
        self._vocab = share_vocab(self.student, self.speaker, len(self.tokenizer), self.print)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's trainable parameters, and the learning rate's shape."""
        optimizer = self.optimizer([p for p in self.student.parameters() if p.requires_grad])
        return with_schedule(optimizer, self.lr_schedule, self.warmup, self.share_done or self._total_steps())

    @cached_property
    def writers(self) -> Writers:
        """The generators of this run, behind its response store."""
        trainer, (shard, shards) = self.trainer, self.shard
        part = "" if shards == 1 else f"{shard + 1}of{shards}"
        store = ResponseStore(self.store or f"{trainer.default_root_dir}/responses", trainer.global_rank, part)
        ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.barrier, shard, shards)
        brought = self.curator.brings()
        models = {"student": lambda: self.student, "teacher": lambda: getattr(self.speaker, "model", None)}
        known = getattr(self.speaker, "fingerprint", None)
        return Writers(self.generator, store, models, self.tokenizer, ranks, known, brought)

    def prepare_curation(self, prompts: Prompts) -> None:
        """Has everything written that is written once."""
        self.rounds.prepare(prompts)

    @cached_property
    def rounds(self) -> Rounds:
        """The rounds of this run."""
        own = self.trainer.strategy.root_device
        return Rounds(self.curator, self.writers, lambda: self.trainer.global_step, self.overlap, own)

    def curate(self, prompts: Prompts) -> list[Row]:
        """The rows of a round, made known to the teacher."""
        rows = self.rounds.rows(prompts)
        if self.teacher is not None and self.loss.needs_teacher:
            self.teacher.prepare(rows)
        return rows

    def held_out_rows(self, prompts: Prompts) -> list[Row]:
        """Reference responses to held-out prompts: the teacher's, or the data's if none has the student's tokens."""
        self.rounds.wait()
        curator = DatasetCurator() if self.speaker is None else TeacherCurator(self.answers)
        rows = list(curator.curate(prompts, self.writers.generators))
        if self.speaker is not None:
            self.speaker.prepare(rows)
        self.validation.refer_to(prompts, rows, self.tokenizer)
        return rows

    def score(self, batch: Batch, with_teacher: bool = True) -> tuple[Scores, Scores | None]:
        """What student and, if wanted, teacher say about the batch's response positions."""
        teacher = self.teacher if with_teacher else None
        student = partial(score, self.student, batch, self._vocab, self.slicing)
        return side_by_side(student, None if teacher is None else partial(teacher.score, batch), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the mean over the global batch."""
        window = step_window(batch, batch_idx, self.trainer.accumulate_grad_batches)
        if window is not None:  # count over the step and all ranks, so as to divide once
            units = torch.stack([self.loss.units(part) for part in window]).sum(0).to(self.device, non_blocking=True)
            self._units = torch.as_tensor(self.trainer.strategy.reduce(units, reduce_op="sum")).clamp_min(1.0)
        output = self.loss(*self.score(batch, self.loss.needs_teacher), batch)
        loss: Tensor = (output.total / self._units.to(output.total)).sum()
        self.meter.add(output.metrics, loss=loss * self.trainer.world_size)
        # Lightning divides by the micro-batches of a step, and its strategies by the ranks.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_train_start(self) -> None:
        """Puts the schedules, and the random numbers of a resumed run, where the run stands."""
        self._move(self.trainer.global_step, {})
        resume.restore_random(self._saved.get("random", []), self.global_rank, self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then moves the schedules: before a checkpoint of this step can be written."""
        super().optimizer_step(*args, **kwargs)
        self._step = self.meter.reduce()
        self._move(self.trainer.global_step + 1, self._step)

    def _progress(self, step: int) -> Progress:
        if self.share_done is None:
            return Progress(step, self._total_steps())
        share = self.share_done(step)
        return Progress(step, step / share if share > 0 else float("inf"))

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ConfigError("Training has no end: set trainer.max_epochs, trainer.max_steps, or a Budget.")
        return int(total)

    def _move(self, step: int, metrics: Mapping[str, Summary]) -> None:
        for part in (self.loss, self.curator):
            part.update(self._progress(step), metrics)

    def on_train_batch_end(self, *_: Any) -> None:
        """Logs what the step's loss reported, and what the generators counted while they wrote the round."""
        counted = {f"curation/{name}": value for name, value in self.rounds.figures.items()}
        self.log_dict({**flatten(self._step, "train/"), **counted})
        self._step = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts a batch into the held-out figures."""
        self.held_out.update(*self.score(batch, self.speaker is not None), batch)

    def on_validation_epoch_end(self, prefix: str = "val/") -> None:
        """Logs the held-out figures."""
        self.rounds.wait()  # one engine writes the student's rounds and its answers
        figures = self.validation.finish(self, self.writers.refreshed_student(), prefix)
        if self.trainer.state.fn == "fit":
            self._move(self.trainer.global_step, figures)

    test_step = validation_step
    on_test_epoch_end = partialmethod(on_validation_epoch_end, "test/")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs; leaves out the weights that never change."""
        checkpoint["state_dict"] = resume.without_frozen(checkpoint["state_dict"], self.student, "student.")
        random = resume.random_states(self.device)
        checkpoint["distillkit"] = {**self.rounds.state_dict(), "history": self.history, "random": random}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up where the saved run stood."""
        resume.require_trained(checkpoint["state_dict"], self.student, "student.")
        self.strict_loading = all(parameter.requires_grad for parameter in self.student.parameters())
        self._saved = checkpoint["distillkit"]
        self.rounds.load_state_dict(self._saved)
        self.validation.resume(self._saved["history"], checkpoint["global_step"])

    def teardown(self, stage: str) -> None:
        """Stops what is being written ahead."""
        if "rounds" in self.__dict__:
            self.rounds.close()

"""The LightningModule: curate, score with the student, score with the teacher, compare."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial, partialmethod
from typing import Any, Literal

import torch
from lightning import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from distillkit.callbacks.defaults import add_default_callbacks, log_missing_export
from distillkit.config.hyperparameters import describe
from distillkit.curators.single import DatasetCurator, TeacherCurator
from distillkit.evaluation.heldout import HeldOut
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Curator, Generator, Loss, Schedule, Teacher, Verifier
from distillkit.models.capabilities import capabilities
from distillkit.models.loading import records_graphs
from distillkit.models.scoring import score, side_by_side
from distillkit.models.student import Student
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.rounds import RoundRunner
from distillkit.run_folder import RESPONSES
from distillkit.training import optimizer_state, resume, tokens
from distillkit.training.checks import check_kinds, check_lengths, check_output, check_overlap, check_parts
from distillkit.training.generation import generator_pool
from distillkit.training.identity import run_identity
from distillkit.training.lr_schedule import ADAMW, Shape, check_schedule, check_warmup, with_schedule
from distillkit.training.portable import PortableModule
from distillkit.training.run_data import run_prompts, uses_chat_template
from distillkit.training.run_state import load_run, save_run
from distillkit.training.step_log import StepLog, shown_values, shows_values
from distillkit.training.trainer_checks import check_gold_monitors, check_trainer, total_steps
from distillkit.training.validation import Validation, gold_rows
from distillkit.training.window import StepWindow
from distillkit.types import Batch, Progress, Prompts, Row, Sampling, Scores, Slicing, Summary, Tokenizer
from distillkit.types.part import Part, settings_of

_log = logging.getLogger(__name__)


class DistillModule(Part, PortableModule):
    """Trains a student on responses that a curator provides, with a loss that compares it to a teacher.

    Args:
        student: The model that is trained.
        loss: Compares the two models on a batch.
        teacher: The model that the student learns from; None for losses and curators that need none.
        curator: Provides the responses; None uses those of the data.
        generator: Continues prompts for the curator and for validation; None is a `TransformersGenerator`.
        optimizer: Optimizer class, or a function; it is called with the student's trainable parameters.
        lr_schedule: Shape of the learning rate after the warm-up; or a class of schedulers, which is called with the
            optimizer, and whose learning rate then moves at each optimizer step.
        warmup: Fraction of the optimizer steps over which the learning rate grows from 0, in [0, 1); None is 0.05 for a
            shape. A scheduler takes none.
        answers: Sampling of the answers at validation, of teacher and student; None is greedy, at most 128 tokens.
        store: Folder of the response store; None is `responses` in the run's folder.
        slicing: Memory and compilation of the loss; None is the defaults of `Slicing`.
        overlap: Whether the next round is generated during training, by a copy of the student that lags by one round:
            False, True on the training device, or another device for the copy, such as `cuda:1`.
        metrics: Verifiers that score the student's answers to held-out prompts, by the name used in the log.
        added_tokens: Whether student and teacher must have the `same` added tokens; with `unused`, a pair with one base
            vocabulary may differ in added tokens that never occur, which is checked in every prompt and response.
        export: Whether the student is written to `export` in the run's folder when training ends. From Python,
            `enable_checkpointing=False` of the trainer switches it off too.

    Raises:
        ConfigError: If a part is of another kind, if the loss or the curator needs a teacher and there is none, if the
            generator can't generate for both models or does not support a sampling, or if `warmup` is out of range or
            not that of a shape.
    """

    def __init__(
        self,
        student: Student,
        loss: Loss,
        teacher: Teacher | None = None,
        curator: Curator | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = ADAMW,
        lr_schedule: Shape | LRSchedulerCallable = "cosine",
        warmup: float | None = None,
        answers: Sampling | None = None,
        store: str | None = None,
        slicing: Slicing | None = None,
        overlap: bool | str = False,
        metrics: dict[str, Verifier] | None = None,
        added_tokens: Literal["same", "unused"] = "same",
        export: bool = True,
    ) -> None:
        super().__init__()
        settings = {"answers": answers, "optimizer": optimizer, "lr_schedule": lr_schedule}
        check_kinds(student, loss=loss, teacher=teacher, curator=curator, generator=generator, **settings)
        self.curator = curator or DatasetCurator()
        self.warmup = check_warmup(warmup, lr_schedule)
        self.student_spec, self.loss, self.teacher, self.slicing = student, loss, teacher, slicing or Slicing()
        self.generator = generator or TransformersGenerator()
        self.optimizer, self.lr_schedule, self.store = optimizer, lr_schedule, store
        self.student: Any = None  # a transformers model, once `configure_model` has run
        self.held_out, self.step_log = HeldOut(metrics), StepLog()
        self.validation = Validation(self.held_out, answers or Sampling(temperature=0.0, max_new_tokens=128))
        self.answers, self.history = self.validation.sampling, self.validation.history
        check_parts(loss, teacher, self.curator, self.generator, self.answers)
        self.overlap = check_overlap(overlap, self.curator, teacher)
        self.added_tokens: Literal["same", "unused"] = added_tokens
        self.export = export
        self._unshared: dict[int, str] = {}
        self.resumed: dict[str, Any] = {}  # what `load_run` read
        self._units, self._window, self.step_random = torch.ones(1), StepWindow(), resume.StepRandom()
        self.progress_fn: Callable[[int], float] | None = None
        self.shard_index, self.num_shards, self._vocab = 0, 1, 0
        self.save_hyperparameters({name: describe(value, name) for name, value in settings_of(self).items()})
        self.remember_parts()

    def configure_callbacks(self) -> list[Callback]:
        """Adds `FiniteLoss`, `RunCheckpoint` and `Export` to the trainer, each unless it has one of its kind.

        It is the first hook of a run: an unsupported setting is refused, and the last run forgotten.
        """
        check_trainer(self.trainer, self.held_out.names(self.same_vocab_teacher is not None))
        if self.begin_run(self.trainer):
            self.progress_fn, self.resumed, self.step_log = None, {}, StepLog()
            self.validation.start_over()
        add_default_callbacks(self.trainer, self.export and bool(self.trainer.checkpoint_callbacks))
        return []

    def use_progress(self, progress_fn: Callable[[int], float]) -> None:
        """Lets a function decide how far the run is, instead of the trainer's number of steps.

        Args:
            progress_fn: Maps the optimizer steps done to the fraction of the run that is done, in [0, 1].
        """
        self.progress_fn = progress_fn

    def use_shard(self, shard_index: int, num_shards: int) -> None:
        """Limits generation to one shard of the responses; must be called before the generators are first used.

        Args:
            shard_index: Index of the shard, from 0.
            num_shards: Number of shards in all.
        """
        self.shard_index, self.num_shards = shard_index, num_shards

    @property
    def same_vocab_teacher(self) -> Teacher | None:
        """The teacher, if it uses the student's tokenizer."""
        return self.teacher if self.teacher is not None and self.teacher.shares_tokens else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""
        if self._trainer is None:  # no run, so no store whose date a chat template prints
            return tokens.run_tokenizer(self.student_spec, self.same_vocab_teacher, self.store)
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokens.run_tokenizer(self.student_spec, self.same_vocab_teacher, self.store_folder)

    @property
    def store_folder(self) -> str:
        """Folder of the response store."""
        return self.store or f"{self.trainer.default_root_dir}/{RESPONSES}"

    def prepare_data(self) -> None:
        """Downloads and converts the student's files, once per machine."""
        self.student_spec.prepare()
        _ = self.tokenizer  # one process fixes the date that a chat template prints, before the others need it

    def setup(self, stage: str) -> None:
        """Checks that the tokenizers match and the learning rate has a schedule, before any model is loaded."""
        if stage == "fit":
            check_schedule(self.optimizer, self.lr_schedule)
        prompts = run_prompts(self.trainer)
        if stage == "fit":
            has_teacher = self.same_vocab_teacher is not None
            check_gold_monitors(self.trainer, prompts.get("val", Prompts(())), has_teacher, self._has_held_out_loss)
        if self.same_vocab_teacher is not None:
            teacher = self.same_vocab_teacher.tokenizer()
            names = self.student_spec.source, self.same_vocab_teacher.display_name
            self._unshared = tokens.compare_tokens(self.tokenizer, teacher, *names, self.added_tokens, prompts)
            if uses_chat_template(self.trainer):
                tokens.log_template_difference(self.tokenizer, teacher, self.store_folder)
        elif self.teacher is not None:
            self.teacher.prepare_alignment(self.tokenizer, prompts.get("train", Prompts(())))

    def configure_model(self) -> None:
        """Loads both models, unless they are, and cuts them to the tokens that they share."""
        device = self.trainer.strategy.root_device
        self._load_models(device, self.print)
        if self.teacher is not None:
            self.teacher.setup(device)  # the last run may have been on another one
        self._unshared |= tokens.without_logits(self.tokenizer, self._vocab, run_prompts(self.trainer))
        models = self.student, self.student_spec.source, self.same_vocab_teacher
        check_lengths(*models, run_prompts(self.trainer), self.curator, self.answers)

    def _load_models(self, device: torch.device, log: Callable[[str], None]) -> None:
        if self._vocab:
            return
        if self.student is None:
            self.student = self.student_spec.load()
        capabilities(self.student, f"student {self.student_spec.source}")
        if self.teacher is not None:
            self.teacher.setup(device)
        models = self.student, self.same_vocab_teacher
        self._vocab = tokens.share_logits(*models, self.tokenizer, self.added_tokens, log)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's trainable parameters, with the learning-rate schedule."""
        optimizer = optimizer_state.make_optimizer(self.optimizer, self.student)
        self.optimizer_settings = optimizer_state.optimizer_identity(optimizer)
        optimizer_state.check_rounding(optimizer)
        return with_schedule(optimizer, self.lr_schedule, self.warmup, self.progress_fn or total_steps(self.trainer))

    @cached_property
    def writers(self) -> GeneratorPool:
        """The generators of this run, behind its response store."""
        return generator_pool(self)

    @cached_property
    def rounds(self) -> RoundRunner:
        """The rounds of this run."""
        device = self.trainer.strategy.root_device
        return RoundRunner(
            self.curator, self.writers, lambda: self.trainer.global_step, self.overlap, device, self._prepare_teacher
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings, data and models of the run, which a resumed run is compared with."""
        settings = self.optimizer_settings or optimizer_state.expected_identity(self.optimizer, self.student)
        return run_identity(self, self.trainer) | {"optimizer": settings}

    def _prepare_teacher(self, rows: list[Row]) -> None:
        tokens.check_tokens(self._unshared, rows)
        if self.teacher is not None and self.loss.needs_teacher:
            self.teacher.prepare(rows)

    def needs_reference(self, split: str) -> str:
        """The part that needs the responses that come with the prompts of a split (`train`, `val`, `test`), or `""`."""
        if split == "train":
            return "the curator" if self.curator.needs_reference else ""
        if self.same_vocab_teacher is None:
            return "validation without a teacher"
        return "one of model.metrics" if self.held_out.needs_reference else ""

    def check_held_out(self, prompts: Prompts) -> None:
        """Refuses held-out prompts on which the student can't be evaluated."""
        self.held_out.check(prompts)

    def reference_rows(self, prompts: Prompts) -> list[list[Row]]:
        """Rows of each held-out prompt: a reference response, and the data's own if the reference is the teacher's.

        Without a teacher that uses the student's tokenizer, the data's responses are the references.
        """
        self.rounds.wait()
        teacher = self.same_vocab_teacher
        curator = DatasetCurator() if teacher is None else TeacherCurator(self.answers)
        references = list(curator.curate(prompts, self.writers.generators))
        pairs = zip(references, prompts, strict=True)
        groups = [[row, *([] if teacher is None else gold_rows(prompt))] for row, prompt in pairs]
        rows = [row for group in groups for row in group]
        tokens.check_tokens(self._unshared, rows)
        if teacher is not None:
            teacher.prepare(rows)
        self.validation.set_references(prompts, references, self.tokenizer)
        return groups

    def score(self, batch: Batch, with_teacher: bool = True) -> tuple[Scores, Scores | None]:
        """Scores of the batch's response positions by the student and, if `with_teacher`, by the teacher."""
        self._load_models(self.device, _log.info)
        teacher = self.teacher if with_teacher else None
        student = partial(score, self.student, batch, self._vocab, self.slicing)
        sequential = records_graphs(self.student) or (teacher is not None and records_graphs(teacher.scoring_module))
        return side_by_side(
            student, None if teacher is None else partial(teacher.score, batch), self.device, sequential
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's part of the mean loss over the global batch."""
        window = self._window.add(batch, batch_idx, self.trainer.accumulate_grad_batches)
        if window is not None:  # count over the step and all ranks, so as to divide once
            units = torch.stack([self.loss.units(part) for part in window]).sum(0).to(self.device, non_blocking=True)
            self._units = torch.as_tensor(self.trainer.strategy.reduce(units, reduce_op="sum")).clamp_min(1.0)
        output = self.loss(*self.score(batch, self.loss.needs_teacher), batch)
        check_output(self.loss, output, self._units)
        loss: Tensor = (output.total / self._units.to(output.total)).sum()
        self.step_log.meter.add(output.metrics, loss=loss * self.trainer.world_size)
        # Lightning divides by the micro-batches of a step, and its strategies by the ranks.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_backward(self, loss: Tensor) -> None:
        """Accumulates gradients outside the memory of CUDA graphs, which the next micro-batch would overwrite."""
        if self.trainer.accumulate_grad_batches > 1 and records_graphs(self.student):
            for parameter in self.student.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Notes the random state at the start of an optimizer step, where a checkpoint inside the step resumes."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_random.note(epoch_loop.total_batch_idx, self.device)
            # The step of the loggers. After a resume Lightning may have counted one too many.
            epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_train_start(self) -> None:
        """Sets the schedules to the current step, and restores the random state of a resumed run."""
        self._update_schedules(self.trainer.global_step, {})
        if self.resumed:
            optimizer_state.refresh_rates(config.scheduler for config in self.trainer.lr_scheduler_configs)
        resume.restore_random(self.resumed.get("random", []), self.global_rank, self.device)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the 2-norm of the gradient of this step, `[]`, computed once, before clipping."""
        return self.step_log.gradient_norm(optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Notes the norm of the gradient, which is clipped next, and the learning rates."""
        self.step_log.note(optimizer)

    def configure_gradient_clipping(self, optimizer: Optimizer, **settings: Any) -> None:  # type: ignore[override]
        """Clips the gradient; in `bf16-mixed` that of a fused optimizer too, which Lightning refuses."""
        if not self.step_log.clip(self.trainer.precision_plugin, optimizer, settings):
            super().configure_gradient_clipping(optimizer, **settings)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then updates the schedules: before a checkpoint of this step can be written."""
        super().optimizer_step(*args, **kwargs)
        self._window.close()
        self._update_schedules(self.trainer.global_step + 1, self.step_log.close(self.schedules))

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the loss and of the curator by the names under which they are logged, after `train/`."""
        of_curator = {f"curator/{name}": schedule for name, schedule in self.curator.schedules().items()}
        return {**self.loss.schedules(), **of_curator}

    def _progress(self, step: int) -> Progress:
        if self.progress_fn is None:
            return Progress(step, total_steps(self.trainer))
        fraction = self.progress_fn(step)
        return Progress(step, step / fraction if fraction > 0 else float("inf"))

    def _update_schedules(self, step: int, metrics: Mapping[str, Summary]) -> None:
        for part in (self.loss, self.curator):
            part.update(self._progress(step), metrics)

    def on_train_batch_end(self, *_: Any) -> None:
        """Logs the values of the step, and the metrics of the generators in the current round."""
        values, curation = self.step_log.pop(self.schedules), self.rounds.metrics
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self.log_dict({f"curation/{name}": value for name, value in curation.items()})
        if values and shows_values(self.trainer):
            self.log_dict(shown_values(values, self.history), prog_bar=True, logger=False)

    def on_fit_end(self) -> None:
        """Says so if nothing has exported the student."""
        log_missing_export(self.trainer)

    @property
    def _has_held_out_loss(self) -> bool:
        return not self.loss.contrasts_sides and (self.same_vocab_teacher is not None or not self.loss.needs_teacher)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the held-out metrics."""
        scores = self.score(batch, self.same_vocab_teacher is not None)
        self.held_out.update(*scores, batch, self.loss if self._has_held_out_loss else None)

    def on_validation_epoch_end(self, prefix: str = "val/") -> None:
        """Logs the held-out metrics."""
        self.rounds.wait()  # the student's rounds and its answers share one engine
        metrics = self.validation.finish(self, self.writers.refreshed_student(), prefix)
        if self.trainer.state.fn == "fit":
            self._update_schedules(self.trainer.global_step, metrics)

    test_step = validation_step
    on_test_epoch_end = partialmethod(on_validation_epoch_end, "test/")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state that a resumed run needs; leaves out frozen weights."""
        save_run(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state of the saved run; what differs is said, or refused."""
        load_run(self, checkpoint)

    def teardown(self, stage: str) -> None:
        """Stops the generation of the next round."""
        if "rounds" in self.__dict__:
            self.rounds.close()
        if stage == "fit":
            self.validation.trained_steps = self.trainer.global_step

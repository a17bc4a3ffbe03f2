"""The one LightningModule: curate, score with the student, score with the teacher, compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from distillkit.curators.single import DatasetCurator, TeacherCurator
from distillkit.errors import ConfigError, ModelError
from distillkit.evaluation.heldout import HeldOut
from distillkit.evaluation.meter import StepMeter, flatten
from distillkit.generators.in_process import TransformersGenerator
from distillkit.generators.stored import Ranks
from distillkit.generators.writers import Writers
from distillkit.interfaces import Curator, Generator, Loss, Teacher
from distillkit.models.scoring import check_head, logits_width, score
from distillkit.models.student import Student
from distillkit.models.tokenizers import require_same
from distillkit.store import ResponseStore
from distillkit.types import Batch, Progress, Prompts, Row, Sampling, Scores, Summary


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

    Raises:
        ConfigError: If the loss or the curator needs a teacher and there is none, or `warmup` is out of range.
    """

    def __init__(
        self,
        student: Student,
        loss: Loss,
        teacher: Teacher | None = None,
        curator: Curator | None = None,
        generator: Generator | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.05,
        answers: Sampling | None = None,
        store: str | None = None,
    ) -> None:
        super().__init__()
        self.curator = curator or DatasetCurator()
        for part, needy in ((loss, loss.needs_teacher), (self.curator, "teacher" in self.curator.writers)):
            if needy and teacher is None:
                raise ConfigError(f"model.teacher is missing: {type(part).__name__} needs one.")
        if not 0 <= warmup < 1:
            raise ConfigError(f"model.warmup must lie in [0, 1), a share of the optimizer steps, got {warmup}.")
        self.loader, self.loss, self.teacher = student, loss, teacher
        self.generator = generator or TransformersGenerator()
        self.optimizer, self.lr_schedule, self.warmup, self.store = optimizer, lr_schedule, warmup, store
        self.answers = answers or Sampling(temperature=0.0, max_new_tokens=128)
        self.student: nn.Module | None = None
        self.held_out, self.meter = HeldOut(), StepMeter()
        self._tokenizer: Any = None
        self._writers: Writers | None = None
        self.history: list[dict[str, float]] = []
        self._references: tuple[Prompts, list[str]] = (Prompts(()), [])
        self._restored: dict[str, Any] = {}
        self._rng: Tensor | None = None
        self._step: dict[str, Summary] = {}
        self._units = torch.ones(1)
        self._vocab = 0

    # ── set-up ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.loader.tokenizer()
        return self._tokenizer

    def prepare_data(self) -> None:
        """Fetches and converts the models' files, once per machine."""
        self.loader.prepare()

    def setup(self, stage: str) -> None:
        """Compares the tokenizers before any model is loaded."""
        if self.teacher is not None:
            require_same(self.tokenizer, self.teacher.tokenizer(), "student", "teacher")

    def configure_model(self) -> None:
        """Loads both models and cuts them to the tokens that they share."""
        if self.student is not None:
            return
        device = self.trainer.strategy.root_device
        self.student = self.loader.load()
        check_head(self.student, f"student {self.loader.source}")
        self._vocab = logits_width(self.student)
        if self.teacher is not None:
            self.teacher.setup(device)
            widths = (self._vocab, self.teacher.vocab_size)
            if widths[0] != widths[1]:
                self.print(f"The student has {widths[0]} logits and the teacher {widths[1]}: both are cut to {min(widths)}.")
            self._vocab = min(widths)
            if len(self.tokenizer) > self._vocab:
                raise ModelError(f"The tokenizer has {len(self.tokenizer)} tokens and the models share {self._vocab} logits.")
            self.teacher.limit_vocab(self._vocab)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over the student's trainable parameters, and the learning rate's shape."""
        from transformers import get_scheduler

        assert self.student is not None
        optimizer = self.optimizer([p for p in self.student.parameters() if p.requires_grad])
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.warmup * total)
        name = "constant_with_warmup" if self.lr_schedule == "constant" else self.lr_schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ── curate ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def writers(self) -> Writers:
        """The generators of this run, behind its response store."""
        if self._writers is None:
            trainer = self.trainer
            folder = self.store or str(Path(trainer.default_root_dir) / "responses")
            models = {"student": lambda: self.student, "teacher": lambda: self.teacher and self.teacher.model}
            ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
            store = ResponseStore(folder, trainer.global_rank)
            self._writers = Writers(self.generator, store, models, self.tokenizer, ranks)  # type: ignore[arg-type]
            self._writers.round |= self._restored
        return self._writers

    def prepare_curation(self, prompts: Prompts) -> None:
        """Has everything written that is written once, for all prompts of the run."""
        self.curator.prepare(prompts, self.writers.generators)

    def curate(self, prompts: Prompts) -> list[Row]:
        """The rows of a round."""
        return list(self.curator.curate(prompts, self.writers.generators))

    def held_out_rows(self, prompts: Prompts) -> list[Row]:
        """Reference responses to held-out prompts: the teacher's, or the data's if there is no teacher."""
        curator: Curator = DatasetCurator() if self.teacher is None else TeacherCurator(self.answers)
        rows = list(curator.curate(prompts, self.writers.generators))
        texts = [[i for i, used in zip(row.input_ids, row.response_mask, strict=True) if used] for row in rows]
        references = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts]
        self._references = (prompts, references)
        return rows

    # ── score and compare ─────────────────────────────────────────────────────────────────────────────────────────

    def score(self, batch: Batch) -> tuple[Scores, Scores | None]:
        """What student and teacher say about the batch's response positions."""
        assert self.student is not None
        student = score(self.student, batch, self._vocab)
        return student, None if self.teacher is None else self.teacher.score(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the mean over the global batch."""
        if batch.window is not None or self.trainer.accumulate_grad_batches == 1:
            self._units = self._count_units(batch.window or (batch,))
        elif batch_idx % self.trainer.accumulate_grad_batches == 0:
            raise ConfigError(
                "trainer.accumulate_grad_batches above 1 needs a loader that says which batches form a step: "
                "use DistillData, or give the first batch of each step its `window`."
            )
        student, teacher = self.score(batch)
        output = self.loss(student, teacher if self.loss.needs_teacher else None, batch)
        loss = (output.total / self._units.to(output.total)).sum()
        # Lightning divides by the micro-batches of a step, and its strategies by the ranks.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self.meter.add(output.metrics, loss=loss * self.trainer.world_size)
        return loss * share

    def _count_units(self, window: Sequence[Batch]) -> Tensor:
        """Units of the optimizer step, over its micro-batches and all ranks."""
        units = torch.stack([self.loss.units(batch) for batch in window]).sum(0)
        return self.trainer.strategy.reduce(units.to(self.device), reduce_op="sum").cpu().clamp_min(1.0)

    def on_train_start(self) -> None:
        """Puts the schedules where the run stands."""
        self.loss.update(self._progress(self.trainer.global_step), {})
        if self._rng is not None:
            torch.set_rng_state(self._rng)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then moves the schedules: before a checkpoint of this step can be written."""
        super().optimizer_step(*args, **kwargs)
        self._step = self.meter.reduce()
        self.loss.update(self._progress(self.trainer.global_step + 1), self._step)

    def on_train_batch_end(self, *_: Any) -> None:
        """Logs what the step's loss reported."""
        if self._step:
            self.log_dict(flatten(self._step, "train/"))
            self._step = {}

    def _progress(self, step: int) -> Progress:
        return Progress(step, int(self.trainer.estimated_stepping_batches))

    # ── evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts a batch into the held-out figures."""
        self.held_out.update(*self.score(batch), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.held_out.update(*self.score(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures; those before training too, if the sanity check covers all of validation."""
        if not self.trainer.sanity_checking:
            self._evaluate("val/")
        elif self.trainer.num_sanity_val_steps == float("inf"):
            self._evaluate("val/")
        else:
            self.held_out.reset()

    def on_test_epoch_end(self) -> None:
        """Logs the held-out figures of the test prompts."""
        self._evaluate("test/")

    def _evaluate(self, prefix: str) -> None:
        prompts, references = self._references
        own = slice(self.trainer.global_rank, None, self.trainer.world_size)
        self.held_out.answer(self.writers.refreshed_student(), prompts[own], references[own], self.answers)
        figures = {prefix + name: value for name, value in self.held_out.compute().items()}
        self.history.append({"step": self.trainer.global_step} | {k: float(v) for k, v in figures.items()})
        if self.trainer.sanity_checking:  # Lightning logs nothing there
            for logger in self.trainer.loggers:
                logger.log_metrics({name: float(value) for name, value in figures.items()}, step=0)
        else:
            self.log_dict(figures)

    # ── checkpoint ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs; leaves out what never changes: the frozen weights under a LoRA adapter."""
        assert self.student is not None
        frozen = {f"student.{name}" for name, p in self.student.named_parameters() if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        round_now = self.writers.round if self._writers else {}
        checkpoint["distillkit"] = {"round": round_now, "history": self.history, "rng": torch.get_rng_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up where the saved run stood."""
        saved = checkpoint.get("distillkit", {})
        self._restored, self.history, self._rng = saved.get("round", {}), saved.get("history", []), saved.get("rng")
        if self._writers is not None:
            self._writers.round |= self._restored
        assert self.student is not None
        self.strict_loading = all(parameter.requires_grad for parameter in self.student.parameters())

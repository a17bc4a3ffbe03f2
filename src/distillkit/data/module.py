"""The data module: prompts for training, validation and test."""

import logging
from typing import Any, Literal

import torch
from lightning import LightningDataModule

from distillkit.data.chat import encode_all, require_chat_template
from distillkit.data.collate import Layout, collate
from distillkit.data.decontaminate import Decontamination, without_overlap
from distillkit.data.loader import FixedLoader, RoundLoader, rank_rows
from distillkit.data.records import Record, Source
from distillkit.errors import ConfigError, DataError
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Batch, Prompts, Row

_log = logging.getLogger(__name__)


class DistillData(LightningDataModule):
    """Prompts, rendered with the model's own chat template, and the batches that the module's curator makes of them.

    Args:
        train: Training prompts: a path (JSONL, Parquet, CSV), a hub id, `wheel:...`, or a source with its columns.
        val: Held-out prompts for validation; None for no validation.
        test: Held-out prompts for `test`; None for the validation's.
        batch_size: Prompts in a micro-batch of one device; a prompt may have several rows (a pair has two).
        eval_batch_size: Rows in a validation batch; None for `batch_size`.
        max_length: Longest prompt, and longest conversation of prompt and response from the data, in tokens.
        overlong: What to do with longer ones: `error`, or `drop`, which says how many.
        chat: Whether the model's chat template is applied; False for plain text.
        system: System message put before conversations that have none; None for no message of ours.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the order.
        layout: How the models get a batch. `shared`: the rows end to end without padding, those of one prompt with one
            copy of what they begin with; `packed`: a copy for each; `padded`: rows of equal length. All give the same
            loss to rounding; a model whose attention can't be told who sees whom gets padded rows.
        bucket: The length of packed rows is filled up to a multiple of so many tokens: fewer lengths, for models that
            are compiled to CUDA graphs.
        decontaminate: Leaves out training prompts that overlap with evaluation prompts, and says how many; None
            compares nothing.

    Raises:
        ConfigError: If a number is below 1.
    """

    def __init__(
        self,
        train: str | Source,
        val: str | Source | None = None,
        test: str | Source | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        overlong: Literal["error", "drop"] = "error",
        chat: bool = True,
        system: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        layout: Layout = "shared",
        bucket: int = 1,
        decontaminate: Decontamination | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_length": max_length,
            "bucket": bucket,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ConfigError(f"DistillData.{name} must be at least 1, got {number}.")
        self.sources: dict[str, Any] = {"train": train, "val": val, "test": test if test is not None else val}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.max_length, self.overlong, self.chat, self.system = max_length, overlong, chat, system
        self.shuffle, self.seed = shuffle, seed
        self.layout: Layout = layout
        self.bucket, self.decontaminate = bucket, decontaminate
        self.prompts: dict[str, Prompts] = {}
        self._records: dict[str, list[Record]] = {}
        self._loader: RoundLoader | None = None
        self._resume_at: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Checks that the files are there and reads them, before any model is touched."""
        for source in (*self.sources.values(), *self._against()):
            if source is not None:
                _as_source(source).check()
        self._read()

    def setup(self, stage: str) -> None:
        """Tokenises the prompts with the student's tokenizer.

        Raises:
            DataError: If a prompt is malformed or too long, or lacks the response that the curator needs, or there are
                no prompts for what is asked.
            ModelError: If the chat template is missing.
        """
        self._read()
        wanted = {"validate": "val", "test": "test"}.get(stage, "train")
        if wanted not in self._records:
            raise DataError(f"data.{wanted} is missing: there are no prompts to work on.")
        module, trainer = self._module(), self.trainer
        if wanted == "train" and "val" not in self._records and trainer is not None:
            trainer.limit_val_batches = 0  # Lightning warns of an empty loader
        require_chat_template(module.tokenizer, self.chat)
        ends = eos_ids(module.tokenizer, None)
        used = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for name, records in self._records.items():
            if name not in used or name in self.prompts:
                continue
            if name == "train":
                who = "the curator" if module.curator.needs_reference else ""
            else:
                who = "validation without a teacher" if module.speaker is None else ""
                who = who or ("one of model.metrics" if module.held_out.needs_reference else "")
            if who:
                _require_responses(records, who)
            prompts, report = encode_all(
                records, module.tokenizer, ends, chat=self.chat, system=self.system,
                max_length=self.max_length, overlong=self.overlong,
            )  # fmt: skip
            _log.info("%s: %s", name, report)
            if not prompts:
                raise DataError(f"Every {name} prompt is longer than `data.max_length: {self.max_length}`: raise it.")
            self.prompts[name] = Prompts(tuple(prompts))
            if name != "train":
                module.held_out.check(self.prompts[name])

    def train_dataloader(self) -> RoundLoader:
        """Batches of the module's current round."""
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        self._loader = RoundLoader(
            self.prompts["train"], module.prepare_curation, module.curate, module.tokenizer.pad_token_id,
            self.batch_size, trainer.accumulate_grad_batches, module.curator.rounds, lambda: trainer.current_epoch,
            self.shuffle, self.seed, trainer.global_rank, trainer.world_size, self.layout, self.bucket,
            module.rounds.begin if module.overlap else None, self._reaches,
        )  # fmt: skip
        if self._resume_at:
            self._loader.load_state_dict(self._resume_at)
            self._resume_at = {}
        return self._loader

    def _reaches(self, epoch: int, step: int) -> bool:
        """Whether the run gets to an optimizer step of an epoch."""
        trainer = self.trainer
        assert trainer is not None
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        return step < steps and epoch * steps + step < trainer.estimated_stepping_batches

    def on_exception(self, exception: BaseException) -> None:
        """Stops what is being written ahead, so that the process can end."""
        self._module().teardown("fit")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copies a batch to a GPU while that is at work."""
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands. Lightning saves the loader's own state too, but restores it too late.

        It hands it to a loader that is made after the checkpoint is read, and the number of optimizer steps, which the
        learning rate's schedule depends on, makes the loader before.
        """
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next loader goes on where the saved one stood."""
        self._resume_at = state_dict

    def val_dataloader(self) -> FixedLoader:
        """Batches of the held-out prompts with their reference responses."""
        return self._held_out("val")

    def test_dataloader(self) -> FixedLoader:
        """As for validation, with the test prompts."""
        return self._held_out("test")

    def _held_out(self, name: str) -> FixedLoader:
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        if name not in self.prompts:
            return FixedLoader([])
        rows: list[Row] = module.held_out_rows(self.prompts[name])
        size = self.eval_batch_size * trainer.world_size
        groups = [[[row] for row in rows[start : start + size]] for start in range(0, len(rows), size)]
        own = [rank_rows(group, trainer.global_rank, trainer.world_size) for group in groups]
        return FixedLoader([collate(batch, module.tokenizer.pad_token_id, self.layout) for batch in own])

    def _read(self) -> None:
        if self._records:
            return
        held_out = {name: _as_source(source).records() for name, source in self._held_out_sources().items()}
        train = _as_source(self.sources["train"]).records()  # last: a source may take its time to make them
        if self.decontaminate is not None:
            train = without_overlap(train, held_out, self.decontaminate.ngram)
        self._records = {"train": train} | {name: held_out[name] for name in ("val", "test") if name in held_out}

    def _held_out_sources(self) -> dict[str, str | Source]:
        """The sources of evaluation prompts by their names: those of the run, and those that are only compared with."""
        own = {name: source for name, source in self.sources.items() if name != "train" and source is not None}
        return own | {_as_source(source).path: source for source in self._against()}

    def _against(self) -> list[str | Source]:
        return [] if self.decontaminate is None else list(self.decontaminate.against)

    def _module(self) -> Any:  # it is above this layer: what is used of it is duck-typed
        assert self.trainer is not None
        return self.trainer.lightning_module


def _as_source(source: str | Source) -> Source:
    return Source(source) if isinstance(source, str) else source


def _require_responses(records: list[Record], who: str) -> None:
    for record in records:
        if record.messages[-1]["role"] != "assistant":
            raise DataError(
                f"{record.origin} has no response, and {who} needs one: add a response column, or let a teacher write."
            )

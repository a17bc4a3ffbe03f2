"""The data module: prompts for training, validation and test."""

import logging
from pathlib import Path
from typing import IO, Any, Literal, Self, cast

import torch
from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE

from distillkit.config.hyperparameters import construct, describe
from distillkit.data.chat import require_chat_template
from distillkit.data.collate import Layout, collate
from distillkit.data.decontaminate import Decontamination, without_overlap
from distillkit.data.formats import Format
from distillkit.data.records import OnError, Source, SourceSetting, check_source_setting, log_left_out, refusal
from distillkit.devices.seeds import resolve_seed
from distillkit.devices.streams import backend
from distillkit.errors import ConfigError, DataError, check_range
from distillkit.interfaces import PromptSource
from distillkit.models.tokenizers import eos_ids
from distillkit.rollouts.loader import Batching, FixedLoader, RoundLoader, rank_rows
from distillkit.training.checkpoint import Checkpoint
from distillkit.training.encoded import EncodedPrompts, encode_split
from distillkit.training.module import DistillModule
from distillkit.training.row_source import RowSource
from distillkit.types import Batch, Prompts, Record, Tokenizer
from distillkit.types.part import Part, settings_of

_log = logging.getLogger(__name__)


class DistillData(Part, LightningDataModule):
    """Prompts rendered with the student's chat template, and the batches that the module's curator makes of them.

    Args:
        train: Training prompts: a path (JSONL, Parquet, CSV), a hub id, `wheel:...`, a list of these, or a source with
            its columns.
        val: Held-out prompts for validation; None for no validation.
        test: Held-out prompts for `test`; None for those of `val`.
        batch_size: Prompts per micro-batch and device; a prompt may have several rows (a pair has two).
        eval_batch_size: Rows in a validation batch; None for `batch_size`.
        max_length: Longest prompt, and longest conversation of prompt and response from the data, in tokens.
        format: Format of the rows: `plain` (prompt, response), `openai` (messages), `sharegpt` (conversations),
            `alpaca` (instruction, output), `preference` (chosen, rejected) or `trl` (prompt, completion); `auto` tells
            it by the columns of each row, and the log says which. A source with a format has its own.
        on_error: Treatment of rows that can't be used: `stop` lists the first 20 and stops, `skip` leaves them out,
            counts and lists them. A source with an `on_error` has its own.
        overlong: What to do with longer ones: `error` stops, `drop` leaves them out and logs how many.
        chat: Whether the student's chat template is applied; False for plain text.
        system: System message for conversations that have none; None adds none.
        shuffle: Whether the prompts are shuffled anew in each epoch.
        seed: Seed of the shuffling; None is the seed of the run (`seed_everything`).
        layout: How a batch is passed to the models. `shared`: rows end to end without padding, and rows of the same
            prompt share one copy of their common prefix; `packed`: end to end, each row complete; `padded`: rows of
            equal length. All give the same loss up to rounding. A model whose attention does not support packed rows
            is given padded ones.
        bucket: Packed rows are filled up to a multiple of this many tokens, so that models compiled to CUDA graphs meet
            fewer lengths.
        decontaminate: Leaves out training prompts that overlap with evaluation prompts, and logs how many; None
            compares nothing.

    Raises:
        ConfigError: If a size or length is below 1.
    """

    def __init__(
        self,
        train: SourceSetting,
        val: SourceSetting | None = None,
        test: SourceSetting | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 2048,
        format: Format = "auto",
        on_error: OnError = "stop",
        overlong: Literal["error", "drop"] = "error",
        chat: bool = True,
        system: str | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        layout: Layout = "shared",
        bucket: int = 1,
        decontaminate: Decontamination | None = None,
    ) -> None:
        super().__init__()
        check_range("DistillData.batch_size", batch_size, 1)
        check_range("DistillData.eval_batch_size", eval_batch_size, 1)
        check_range("DistillData.max_length", max_length, 1)
        check_range("DistillData.bucket", bucket, 1)
        if train is None:
            raise ConfigError("DistillData.train is missing: name the training prompts, such as a JSONL file.")
        for name, source in {"train": train, "val": val, "test": test}.items():
            check_source_setting(f"DistillData.{name}", source)
        self.format: Format = format
        self.on_error: OnError = on_error
        self.sources: dict[str, SourceSetting | None] = {
            "train": train,
            "val": val,
            "test": test if test is not None else val,
        }
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.max_length, self.overlong, self.chat, self.system = max_length, overlong, chat, system
        self.shuffle, self.seed = shuffle, resolve_seed(seed)
        self.layout: Layout = layout
        self.bucket, self.decontaminate = bucket, decontaminate
        self.prompts: dict[str, Prompts] = {}
        self._records: dict[str, list[Record]] = {}
        self.save_hyperparameters({name: describe(value, name) for name, value in settings_of(self).items()})

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes the data module of a run again, at the start of an epoch.

        Args:
            checkpoint_path: The checkpoint.
            map_location: As in `torch.load`.
            hparams_file: Not supported: pass settings by name.
            weights_only: As in `torch.load`; None is True: no code in the file is run.
            kwargs: Arguments of the constructor that replace the recorded ones.

        Raises:
            ConfigError: If there is no such file, or `hparams_file` is set.
            ModelError: If it is damaged, or a source can't be made again.
        """
        if hparams_file is not None:
            raise ConfigError("hparams_file is not supported: pass the settings by name, such as train='x.jsonl'.")
        checkpoint = Checkpoint.read(checkpoint_path, map_location, weights_only)
        data: Self = construct(cls, checkpoint.settings(cls.CHECKPOINT_HYPER_PARAMS_KEY, kwargs))
        return data

    def prepare_data(self) -> None:
        """Checks that the files exist and reads them, before any model is loaded; those for training only to train."""
        for source in self._sources_of_run().values():
            self._source(source).check()
        self._read()

    def setup(self, stage: str) -> None:
        """Tokenises the prompts with the student's tokenizer.

        Raises:
            DataError: If a prompt is malformed or too long, or lacks the response that the curator needs, or if
                there are no prompts for this stage.
            ModelError: If the chat template is missing.
            ConfigError: If no trainer has the data module.
        """
        self._read()
        split = {"validate": "val", "test": "test"}.get(stage, "train")
        if split not in self._records:
            raise DataError(f"data.{split} is missing: there are no prompts to work on.")
        module, trainer = self._module(), self.trainer
        if split == "train" and "val" not in self._records and trainer is not None:
            trainer.limit_val_batches = 0  # Lightning warns of an empty loader
        require_chat_template(module.tokenizer, self.chat)
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for name, records in list(self._records.items()):
            if name in splits and name not in self.prompts:
                self.prompts[name] = self._encode(name, records, module)
                self._records[name] = []  # many take much memory
                if name != "train":
                    module.check_held_out(self.prompts[name])

    def _encode(self, name: str, records: list[Record], module: RowSource) -> Prompts:
        consumer, source = module.needs_reference(name), self.sources[name]
        assert source is not None
        on_error = self._source(source).on_error or self.on_error
        if consumer:
            records = _with_responses(name, records, consumer, on_error)
        prompts, report = encode_split(
            records,
            module.tokenizer,
            eos_ids(module.tokenizer, None),
            chat=self.chat,
            system=self.system,
            max_length=self.max_length,
            overlong=self.overlong,
            responses="all" if consumer else "first",
            on_error=on_error,
        )
        _log.info("%s: %s", name, report)
        log_left_out(name, report.left_out, len(records))
        if not prompts:
            raise DataError(
                f"No {name} prompt is left: {len(report.overlong)} of {len(records)} are longer than "
                f"`data.max_length: {self.max_length}`, {len(report.problems)} can't be encoded."
            )
        items = prompts if isinstance(prompts, EncodedPrompts) else tuple(prompts)
        return Prompts(items, purpose="training" if name == "train" else "reference")

    def train_dataloader(self) -> RoundLoader:
        """Batches of the module's current round."""
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        batching = Batching(
            self.batch_size,
            _pad_id(module.tokenizer),
            trainer.accumulate_grad_batches,
            self.shuffle,
            trainer.overfit_batches > 0,  # type: ignore[attr-defined]  # Lightning sets it through a connector
            self.seed,
            self.layout,
            self.bucket,
        )
        return RoundLoader(
            self.prompts["train"],
            module.rounds,
            batching,
            TrainerLoop(trainer),
            trainer.global_rank,
            trainer.world_size,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Stops the generation of the next round, so that the process can end."""
        self._module().teardown("fit")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copies a batch to a GPU without waiting for it."""
        return batch.to(device) if backend(device) is None else batch.pin_memory().to(device, non_blocking=True)

    def val_dataloader(self) -> FixedLoader:
        """Batches of the held-out prompts with their reference responses."""
        return self._held_out("val")

    def test_dataloader(self) -> FixedLoader:
        """Batches of the test prompts with their reference responses."""
        return self._held_out("test")

    def _held_out(self, name: str) -> FixedLoader:
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        if name not in self.prompts:
            return FixedLoader([])
        size = self.eval_batch_size * trainer.world_size
        length = -(-len(self.prompts[name]) // size)
        limit = trainer.limit_val_batches if name == "val" else trainer.limit_test_batches
        groups = module.reference_rows(self.prompts[name][: size * _num_batches(length, limit)])
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        batches = [rank_rows(part, trainer.global_rank, trainer.world_size) for part in parts]
        pad_id = _pad_id(module.tokenizer)
        return FixedLoader([collate(rows, pad_id, self.layout, self.bucket) for rows in batches], length)

    def _read(self) -> None:
        if "train" in self._records:
            return
        sources = {name: source for name, source in self._sources_of_run().items() if name not in self._records}
        train_source = sources.pop("train", None)
        by_source = {id(source): source for source in sources.values()}  # val and test may be one, which is read once
        read = {key: self._source(source).records() for key, source in by_source.items()}
        held_out = self._records | {name: read[id(source)] for name, source in sources.items()}
        if train_source is None:
            self._records = held_out
            return
        train = self._source(train_source).records()  # last: a source may take long to make them
        if self.decontaminate is not None:
            train = without_overlap(train, held_out, self.decontaminate.ngram)
        self._records = {"train": train} | {name: held_out[name] for name in ("val", "test") if name in held_out}

    def _sources_of_run(self) -> dict[str, SourceSetting]:
        """The sources of this run by split, and the decontamination's further ones by path."""
        of_run = {name: source for name, source in self.sources.items() if source is not None}
        if self.trainer is not None and self.trainer.state.fn in ("validate", "test"):
            return {name: source for name, source in of_run.items() if name != "train"}
        against = [] if self.decontaminate is None else self.decontaminate.against
        return of_run | {str(self._source(source).path): source for source in against}

    def _source(self, source: SourceSetting) -> PromptSource:
        """A source as an object, with the data's format and treatment of errors where it has none."""
        item = Source(source) if isinstance(source, str | list) else source
        return item.with_defaults(self.format, self.on_error) if isinstance(item, Source) else item

    def _module(self) -> RowSource:
        if self.trainer is None:
            raise ConfigError(
                "DistillData is not attached to a trainer, whose module makes its rows: hand both to "
                "trainer.fit(module, data) or trainer.validate(module, data)."
            )
        module = self.trainer.lightning_module
        return module if isinstance(module, DistillModule) else cast(RowSource, module)


class TrainerLoop:
    """The loop of a trainer.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def epoch(self) -> int:
        """Index of the current epoch."""
        return self.trainer.current_epoch

    @property
    def batches_done(self) -> int:
        """Micro-batches of this epoch that are trained on already; 0 outside of training."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer.training else 0

    @property
    def max_batches(self) -> float:
        """Micro-batches of an epoch, within `limit_train_batches`; infinite before the trainer has asked the loader."""
        return self.trainer.num_training_batches

    def will_run(self, epoch: int, step: int) -> bool:
        """True if the run will reach this optimizer step of this epoch."""
        total = self.trainer.estimated_stepping_batches  # asks the loader for its batches, if that was not done
        steps = -(-self.trainer.num_training_batches // self.trainer.accumulate_grad_batches)
        return step < steps and epoch * steps + step < total


def _num_batches(length: int, limit: int | float) -> int:
    """Batches that a trainer with a limit takes of `length`; at least one, since Lightning refuses a limit of none."""
    return max(min(limit, length) if isinstance(limit, int) else int(length * limit), 1)


def _pad_id(tokenizer: Tokenizer) -> int:
    """The id of the padding token, which every tokenizer loaded by this package has."""
    assert tokenizer.pad_token_id is not None, "the tokenizer has no padding token"
    return tokenizer.pad_token_id


def _with_responses(name: str, records: list[Record], consumer: str, on_error: OnError) -> list[Record]:
    """The records that have a response. One without stops the run, or is left out."""
    advice = f"and {consumer} needs one: add a response column, or let a teacher generate the responses."
    answered = [record for record in records if record.messages[-1]["role"] == "assistant"]
    if len(answered) == len(records):
        return records
    problems = [
        f"{record.origin} has no response, {advice}" for record in records if record.messages[-1]["role"] != "assistant"
    ]
    if on_error == "stop" or not answered:
        raise refusal("data", problems, len(records))
    log_left_out(name, problems, len(records))
    return answered

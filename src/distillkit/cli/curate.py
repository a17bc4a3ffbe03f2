"""The verb `curate`: what `fit` would have written, and scored, before its first step."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning import Callback, Trainer

from distillkit.cli import configs, curate_ray
from distillkit.cli.curate_ray import Workers
from distillkit.cli.train import DistillCLI, launch
from distillkit.curators.single import TeacherCurator
from distillkit.data.module import DistillData
from distillkit.errors import ConfigError
from distillkit.generators.stored import elsewhere
from distillkit.interfaces import Teacher
from distillkit.module import DistillModule
from distillkit.store import ResponseStore
from distillkit.types import Prompts


def run(arguments: list[str]) -> int:
    """Runs `curate` with the arguments that follow it.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    full = [
        f"{flag}=true" if flag == "--score" and value not in ("true", "false") else flag
        for flag, value in itertools.pairwise([*arguments, ""])
    ]
    cli = _launched(full)
    if cli.trainer.workers is not None:
        _by_workers(cli, full)
    elif cli.trainer.is_global_zero:
        print("\n".join(cli.trainer.report))
    return 0


def curated(arguments: list[str]) -> tuple[int, int]:
    """Runs `curate`; how many responses this process wrote, and how many tokens."""
    writers = _launched(arguments).model.writers.generators.values()
    return sum(own.num_responses for own in writers), sum(own.num_tokens for own in writers)


def _launched(arguments: list[str]) -> Any:
    return launch(CurateCLI, "curate", arguments, trainer_class=CurationTrainer, save_config_callback=None)


def _by_workers(cli: Any, arguments: list[str]) -> None:
    """Has Ray's workers write, and says what the store then holds."""
    store = ResponseStore(cli.model.store or f"{cli.trainer.default_root_dir}/responses")
    before = _counts(store)
    files, rest = configs.split_arguments(arguments)
    shares = []
    for share in curate_ray.run(cli.trainer.workers, configs.load_all(files), rest):
        print(share)
        shares.append(share)
    after = _counts(store)
    curate_ray.require_all(store.folder, before.total(), after.total(), shares)
    print("\n".join(_summary(store, before, after)))


def parse_shard(text: str | None) -> tuple[int, int]:
    """The number of a shard, from 0, and how many there are, of a text such as `3/8`, where numbers are from 1.

    Raises:
        ConfigError: If it is nothing of the kind.
    """
    if text is None:
        return 0, 1
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard must be i/n with 1 ≤ i ≤ n, such as 3/8 for the third of eight, got {text!r}.")
    return int(found[1]) - 1, int(found[2])


class CurationTrainer(Trainer):
    """A trainer that can stop where training would begin."""

    workers: Workers | None = None
    """Who is to write in the place of this process."""
    report: Sequence[str] = ()
    """What the store holds when it has been written."""

    def curate(
        self,
        model: DistillModule,
        datamodule: DistillData,
        score: bool = False,
        shard: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float | None = None,
        cpus_per_worker: float = 1.0,
        ray_address: str | None = None,
    ) -> None:
        """Has the responses of the first round written, and those to the held-out prompts.

        Args:
            model: Who writes.
            datamodule: The prompts.
            score: Whether the teacher, a `CachedTeacher`, scores them as well.
            shard: Which part of the responses is written, such as `3/8` for the third of eight; null for all. The
                others are left to other processes, on any machine.
            workers: Processes of a Ray cluster that write a shard each; null writes in this one.
            gpus_per_worker: GPUs of each worker; null is one where the cluster has any.
            cpus_per_worker: CPUs that Ray reserves for each worker.
            ray_address: Address of the cluster; null is that of the environment, or one of this machine.

        Raises:
            ConfigError: If the teacher is to score and keeps no scores, or with a shard; or if that is no `i/n`, or
                workers can't be had.
        """
        model.shard = parse_shard(shard)
        for flag, given in (("--shard", shard), ("--workers", workers)):
            if score and given is not None:
                raise ConfigError(
                    f"--score needs all responses, and {flag} has each process write a part of them: score once all "
                    "are there."
                )
        if workers is not None:
            if shard is not None:
                raise ConfigError("--workers gives each worker a shard: leave --shard out.")
            self.workers = Workers(workers, gpus_per_worker, cpus_per_worker, ray_address)
            return
        if score and (model.teacher is None or type(model.teacher).prepare is Teacher.prepare):
            found = "none" if model.teacher is None else f"a {type(model.teacher).__name__}"
            raise ConfigError(
                f"--score needs a teacher that keeps its scores, and model.teacher is {found}: wrap it in a "
                "CachedTeacher, or leave --score out."
            )
        curation = Curation(score)
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]  # Lightning sets it through a connector
        callbacks.append(curation)
        self.fit(model, datamodule=datamodule)
        self.report = curation.report


class Curation(Callback):
    """Curates once the models stand as they do at the first step, and ends the run.

    Args:
        score: Whether the teacher scores what was written.
    """

    def __init__(self, score: bool) -> None:
        self.score = score
        self.report: list[str] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Writes first, so that a teacher that leaves the memory is loaded once."""
        store, generators = pl_module.writers.store, pl_module.writers.generators
        before = _counts(store)
        loader, held_out = trainer.datamodule.train_dataloader(), trainer.datamodule.prompts.get("val", Prompts(()))
        first = loader.first_round()
        if held_out and pl_module.speaker is not None:
            TeacherCurator(pl_module.answers).curate(held_out, generators)
        pl_module.prepare_curation(loader.prompts)
        pl_module.curator.curate(first, generators)
        after = _counts(store)
        self.report = _summary(store, before, after)
        if pl_module.shard[1] > 1:
            lacking = elsewhere(generators.values())
            number, shards = pl_module.shard
            self.report.append(
                f"shard {number + 1}/{shards} has its share; {len(lacking)} responses of other shards are not here"
                if lacking
                else f"shard {number + 1}/{shards} has its share, and so have all others"
            )
        if self.score:  # as in training: what was written is read, and the rows are handed to the teacher
            rows = pl_module.held_out_rows(held_out) if held_out else []
            rows += pl_module.curate(first) if pl_module.loss.needs_teacher else []
            self.report.append(f"the teacher's scores of {len(rows)} rows are kept")
        trainer.should_stop = True


def _summary(store: ResponseStore, before: Counter[str], after: Counter[str]) -> list[str]:
    """What a store holds, and held."""
    return [
        f"{store.folder}: {count} responses by the {writer}, {before[writer]} of them were there already"
        for writer, count in sorted(after.items())
    ] or [f"{store.folder}: no responses, they all come with the data"]


def _counts(store: Any) -> Counter[str]:
    """Responses in a store by who wrote them."""
    found: Counter[str] = Counter()
    for shard in store.shards():
        found[shard["writer"]] += shard["responses"]
    return found


class CurateCLI(DistillCLI):
    """The same configuration as that of `fit`, with a trainer that does nothing else."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one verb."""
        return {"curate": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer without callbacks, logs, checkpoints and bars, and without anything that keeps it from ending."""
        shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        ending = {"num_sanity_val_steps": 0, "min_epochs": None, "min_steps": None, "fast_dev_run": False}
        ending |= {"max_epochs": 1, "max_steps": -1}  # a run may have no end but a callback's
        return super().instantiate_trainer(callbacks=[], **dict.fromkeys(shown, False), **ending, **kwargs)

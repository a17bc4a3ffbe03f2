"""Curation: generates, and optionally scores, the responses that `fit` needs before its first step."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from distillkit.config.command import Command
from distillkit.curators.single import TeacherCurator
from distillkit.errors import ConfigError
from distillkit.interfaces import Teacher
from distillkit.rollouts.stored import pending_on_other_shards
from distillkit.run_folder import RESPONSES
from distillkit.storage.responses import ResponseStore
from distillkit.training.datamodule import DistillData
from distillkit.training.module import DistillModule
from distillkit.types import Prompts
from distillkit.workflows import curation_ray
from distillkit.workflows.curation_ray import ShardReport, Workers
from distillkit.workflows.launch import DistillCLI, datamodule_of, launch
from distillkit.workflows.logs import show_logs
from distillkit.workflows.stopped import saved_work


@dataclass(frozen=True)
class CurationResult:
    """The outcome of a curation.

    Args:
        report: Lines about the content of the store; empty on all ranks but the first.
        num_responses: Number of responses that this process, or its workers, generated.
        num_tokens: Number of tokens in these responses.
    """

    report: Sequence[str]
    num_responses: int
    num_tokens: int


def curate(
    *configs: str | Path,
    arguments: Sequence[str] = (),
    on_shard_report: Callable[[ShardReport], None] = lambda report: None,
) -> CurationResult:
    """Generates the responses of the first round, and those to the held-out prompts.

    Args:
        configs: Configuration files, later ones over earlier ones.
        arguments: Further settings as on the command line, such as `--score=true` or `--shard=3/8`.
        on_shard_report: Called with the report of each Ray worker when it is done.

    Raises:
        ConfigError: If a config file or argument is wrong; no model has been loaded then.
    """
    rest = [*(f"--config={path}" for path in configs), *arguments]
    cli = launch(CurateCLI, "curate", rest, trainer_class=CurationTrainer)
    model, trainer = cli.model, cli.trainer
    assert isinstance(trainer, CurationTrainer)
    if trainer.workers is not None:
        root = Path(trainer.default_root_dir)
        with saved_work(root, model.store or root / RESPONSES, "curate"):
            return _curate_with_workers(model, trainer, trainer.workers, cli.command, on_shard_report)
    generators = model.writers.generators.values()
    num_responses = sum(generator.num_responses for generator in generators)
    num_tokens = sum(generator.num_tokens for generator in generators)
    return CurationResult(trainer.report if trainer.is_global_zero else (), num_responses, num_tokens)


def _curate_with_workers(
    model: DistillModule,
    trainer: "CurationTrainer",
    workers: Workers,
    command: Command,
    on_shard_report: Callable[[ShardReport], None],
) -> CurationResult:
    """Has the workers of a Ray cluster generate the responses."""
    store = ResponseStore(model.store or f"{trainer.default_root_dir}/{RESPONSES}")
    before = _counts(store)
    reports = []
    for report in curation_ray.run(workers, command.config.content, list(command.arguments), _curate_shard):
        on_shard_report(report)
        reports.append(report)
    after = _counts(store)
    curation_ray.require_all(store.folder, before.total(), after.total(), reports)
    num_responses = sum(report.num_responses for report in reports)
    num_tokens = sum(report.num_tokens for report in reports)
    return CurationResult(_summary(store, before, after), num_responses, num_tokens)


def _curate_shard(arguments: list[str]) -> tuple[int, int]:
    """Curates in a worker's process; returns the numbers of responses and tokens."""
    show_logs()
    result = curate(arguments=arguments)
    return result.num_responses, result.num_tokens


def parse_shard(text: str | None) -> tuple[int, int]:
    """Parses a shard such as `3/8`, where indices start from 1.

    Returns:
        The index of the shard, from 0, and the number of shards; (0, 1) for None.

    Raises:
        ConfigError: If `text` has another format.
    """
    if text is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard must be i/n with 1 ≤ i ≤ n, such as 3/8 for the third of eight, got {text!r}.")
    return int(match[1]) - 1, int(match[2])


class CurationTrainer(Trainer):
    """A trainer that curates, and stops before the first training step."""

    workers: Workers | None = None
    """The Ray workers that generate instead of this process; None if this process generates."""
    report: Sequence[str] = ()
    """Lines about the content of the store, once the curation is done."""

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
        """Generates the responses of the first round, and those to the held-out prompts.

        Args:
            model: The models, which generate the responses.
            datamodule: The prompts.
            score: Whether the teacher, a `CachedTeacher`, scores the responses as well.
            shard: The part of the responses to generate, such as `3/8` for the third of eight; null generates all. The
                other parts are left to other processes, on any machine.
            workers: Number of Ray worker processes, each of which generates a shard; null generates in this process.
            gpus_per_worker: Number of GPUs per worker; null is one if the cluster has any.
            cpus_per_worker: Number of CPUs that Ray reserves for each worker.
            ray_address: Address of the Ray cluster; null is the one in the environment, or a new one on this machine.

        Raises:
            ConfigError: If `score` is set and the teacher caches no scores, or only a shard is generated; if `shard` is
                not of the form `i/n`; or if the workers can't be started.
        """
        model.use_shard(*parse_shard(shard))
        for flag, value in (("--shard", shard), ("--workers", workers)):
            if score and value is not None:
                raise ConfigError(
                    f"--score needs all responses, but with {flag} each process generates only a part of them. Run it "
                    "once all shards are complete."
                )
        if workers is not None:
            if shard is not None:
                raise ConfigError("--workers gives each worker a shard: leave --shard out.")
            self.workers = Workers(workers, gpus_per_worker, cpus_per_worker, ray_address)
            return
        if score and (model.teacher is None or type(model.teacher).prepare is Teacher.prepare):
            teacher = "none" if model.teacher is None else f"a {type(model.teacher).__name__}"
            raise ConfigError(
                f"--score needs a teacher that caches its scores, and model.teacher is {teacher}: wrap it in a "
                "CachedTeacher, or leave --score out."
            )
        curation = Curation(score)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # Lightning sets it through a connector
        callbacks.append(curation)
        self.fit(model, datamodule=datamodule)
        self.report = curation.report


class Curation(Callback):
    """Curates when the models are ready for the first step, then ends the run.

    Args:
        score: Whether the teacher scores the responses.
    """

    def __init__(self, score: bool) -> None:
        self.score = score
        self.report: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates before it scores, so that a teacher that unloads between rounds is loaded only once."""
        assert isinstance(pl_module, DistillModule)
        datamodule = datamodule_of(trainer)
        store, generators = pl_module.writers.store, pl_module.writers.generators
        before = _counts(store)
        loader, held_out = datamodule.train_dataloader(), datamodule.prompts.get("val", Prompts(()))
        first_round = loader.first_round()
        if held_out and pl_module.same_vocab_teacher is not None:
            TeacherCurator(pl_module.answers).curate(held_out, generators)
        pl_module.rounds.prepare(loader.prompts)
        pl_module.curator.curate(first_round, generators)
        after = _counts(store)
        self.report = _summary(store, before, after)
        shard_index, num_shards = pl_module.shard_index, pl_module.num_shards
        if num_shards > 1:
            missing = pending_on_other_shards(generators.values())
            rest = f"; {len(missing)} responses of other shards are missing" if missing else ", and so are all others"
            self.report.append(f"shard {shard_index + 1}/{num_shards} is complete{rest}")
        if self.score:  # as in training: the stored responses are read, and their rows are handed to the teacher
            groups = pl_module.reference_rows(held_out) if held_out else []
            rows = [row for group in groups for row in group]
            rows += pl_module.rounds.rows(first_round) if pl_module.loss.needs_teacher else []
            self.report.append(f"the teacher's scores of {len(rows)} rows are cached")
        trainer.should_stop = True


def _summary(store: ResponseStore, before: Counter[str], after: Counter[str]) -> list[str]:
    """Lines about the content of a store: the responses of each writer, and how many are new."""
    return [
        f"{store.folder}: {count} responses by the {writer}, {before[writer]} of them were there already"
        for writer, count in sorted(after.items())
    ] or [f"{store.folder}: no responses were generated, they all come with the data"]


def _counts(store: ResponseStore) -> Counter[str]:
    """Numbers of responses in a store by writer."""
    counts: Counter[str] = Counter()
    for shard in store.shards():
        counts[shard["writer"]] += shard["responses"]
    return counts


class CurateCLI(DistillCLI):
    """Command line of the verb `curate`, with the same configuration as `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb `curate`."""
        return {"curate": {"model", "datamodule"}}

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """The trainer without callbacks, loggers, checkpoints and bars, and with limits that let it end."""
        disabled = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        limits = {"num_sanity_val_steps": 0, "min_epochs": None, "min_steps": None, "fast_dev_run": False}
        limits |= {"max_epochs": 1, "max_steps": -1}  # in the configuration, only a callback may end the run
        return super().instantiate_trainer(callbacks=[], **dict.fromkeys(disabled, False), **limits, **kwargs)

"""Curation by the workers of a Ray cluster, each of which generates a shard."""

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillkit.errors import ConfigError, DistillKitError, GenerationError, StoreError
from distillkit.run_folder import CONFIG


@dataclass(frozen=True)
class Workers:
    """The worker processes of a curation, and the resources that Ray reserves for each.

    Args:
        num: Number of workers, at least 1; each generates a shard. If resources are short they run one after another.
        gpus: Number of GPUs per worker, the only ones that it can see; None is one if the cluster has any.
        cpus: Number of CPUs per worker.
        address: Address of the cluster; None is the one in the environment variable `RAY_ADDRESS`, or a cluster on this
            machine that ends with the command.

    Raises:
        ConfigError: If a number is out of range, or ray is not installed.
    """

    num: int
    gpus: float | None = None
    cpus: float = 1.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.num}.")
        for name, amount in (("gpus", self.gpus), ("cpus", self.cpus)):
            if amount is not None and amount < 0:
                raise ConfigError(f"--{name}_per_worker must not be below 0, got {amount}.")
        try:
            import ray.data  # noqa: F401  takes seconds
        except ImportError as error:
            raise ConfigError(f'--workers needs ray ({error}): pip install "distillkit[ray]".') from error


@dataclass(frozen=True)
class ShardReport:
    """The report of a worker that has finished or failed.

    Args:
        shard: Its shard, such as `3/8`.
        host: Name of its machine.
        num_responses: Number of responses that it generated.
        num_tokens: Number of tokens in these responses.
        seconds: Duration, including the loading of the models.
        error: Message of the error with which it failed; None if it finished.
    """

    shard: str
    host: str
    num_responses: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"shard {self.shard} on {self.host} failed: {self.error}"
        counts = f"{self.num_responses} responses, {self.num_tokens} tokens"
        return f"shard {self.shard} on {self.host}: {counts} in {self.seconds:.1f} s"


CurateShard = Callable[[list[str]], tuple[int, int]]
"""Curates with the arguments of the command, and returns the numbers of responses and tokens. It must be importable."""


def run(
    workers: Workers, config: dict[str, Any], arguments: list[str], curate_shard: CurateShard
) -> Iterator[ShardReport]:
    """Runs `distillkit curate` for a shard in each worker, and yields their reports as they finish.

    Ray restarts a worker that dies, which then continues its shard.

    Args:
        workers: The workers to start.
        config: The merged configuration.
        arguments: Command-line arguments besides the configuration.
        curate_shard: Function that curates a shard in a worker's process.

    Raises:
        GenerationError: If a worker failed; it is raised after all workers are done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    start_ray = not ray.is_initialized()
    if start_ray:
        ray.init(address=workers.address, include_dashboard=False, logging_level="warning")
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # silences stage announcements and progress bar warnings
        DataContext.get_current().enable_progress_bars = False
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        shards = ray.data.range(workers.num, override_num_blocks=workers.num).map_batches(
            _curate_batch,
            batch_size=1,
            compute=TaskPoolStrategy(size=workers.num),
            num_cpus=workers.cpus,
            num_gpus=(1.0 if has_gpus else 0.0) if workers.gpus is None else workers.gpus,
            max_calls=1,  # a process per shard, so that an engine's memory is freed at its end
            fn_args=(yaml.safe_dump(config, sort_keys=False), arguments, os.getcwd(), workers.num, curate_shard),
        )
        failures = []
        for row in shards.iter_rows():
            report = ShardReport(**json.loads(row["report"]))
            failures += [report] if report.error is not None else []
            yield report
        if failures:
            raise GenerationError(
                f"{len(failures)} of {workers.num} workers failed, the first with: {failures[0].error} The responses "
                "so far are stored. Fix this and run the same command again; only the others are generated."
            )
    finally:
        if start_ray:
            ray.shutdown()


def require_all(store: object, before: int, after: int, reports: list[ShardReport]) -> None:
    """Checks that the responses of all workers are in the store, and not in separate folders on their machines.

    Args:
        store: The store's folder, for the error message.
        before: Number of responses in the store before the workers started.
        after: Number of responses in the store now.
        reports: The reports of the workers.

    Raises:
        StoreError: If the store lacks responses that the workers generated.
    """
    generated = sum(report.num_responses for report in reports)
    if after < before + generated:
        hosts = ", ".join(sorted({report.host for report in reports}))
        raise StoreError(
            f"{store} lacks {before + generated - after} of {generated} responses that workers on {hosts} generated: "
            "model.store must be one folder for all workers, on a shared disk or in a bucket. Combine the stores on "
            "their disks with `distillkit store merge`."
        )


def _curate_batch(
    batch: Mapping[str, Iterable[int]],
    config: str,
    arguments: list[str],
    folder: str,
    num_workers: int,
    curate_shard: CurateShard,
) -> dict[str, list[str]]:
    """Curates the shards in `batch` in a worker's process, and returns their reports as JSON."""
    reports = [
        _curate_one(f"{int(index) + 1}/{num_workers}", config, arguments, folder, curate_shard) for index in batch["id"]
    ]
    return {"report": [json.dumps(vars(report)) for report in reports]}


def _curate_one(shard: str, config: str, arguments: list[str], folder: str, curate_shard: CurateShard) -> ShardReport:
    host, start = socket.gethostname(), time.perf_counter()
    if not Path(folder).is_dir():
        error = f"the folder {folder}, in which the command was started, does not exist on this machine."
        return ShardReport(shard, host, error=error)
    os.chdir(folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CONFIG
        path.write_text(config)
        try:
            num_responses, num_tokens = curate_shard(
                ["--config", str(path), *arguments, "--workers=null", f"--shard={shard}"]
            )
        except DistillKitError as error:
            return ShardReport(shard, host, error=str(error))
    return ShardReport(shard, host, num_responses, num_tokens, time.perf_counter() - start)

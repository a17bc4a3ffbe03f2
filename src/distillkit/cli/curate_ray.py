"""Curation by the workers of a Ray cluster, each of which writes a shard."""

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillkit.errors import ConfigError, DistillKitError, GenerationError, StoreError


@dataclass(frozen=True)
class Workers:
    """How many processes write, and what Ray reserves for each.

    Args:
        num: Workers, at least 1; each writes a shard. With fewer free resources they run one after another.
        gpus: GPUs of a worker, of which it sees no others; None is one where the cluster has any.
        cpus: CPUs of a worker.
        address: Address of the cluster; None is that in the environment variable `RAY_ADDRESS`, or a cluster of this
            machine that ends with the command.

    Raises:
        ConfigError: If a number is outside its range, or ray is not installed.
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
class Share:
    """What a worker says when it is done.

    Args:
        shard: Its shard, such as `3/8`.
        host: Name of its machine.
        num_responses: Responses that it wrote.
        num_tokens: Their tokens.
        seconds: How long it took, with the loading of models.
        error: One line, if it gave up for a reason that has one.
    """

    shard: str
    host: str
    num_responses: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"shard {self.shard} on {self.host} gave up: {self.error}"
        wrote = f"{self.num_responses} responses, {self.num_tokens} tokens"
        return f"shard {self.shard} on {self.host}: {wrote} in {self.seconds:.1f} s"


def run(workers: Workers, config: dict[str, Any], arguments: list[str]) -> Iterator[Share]:
    """Has each worker run `distillkit curate` for its shard; gives what they say, the first to be done first.

    A worker that dies is started again by Ray, and goes on where its shard stood.

    Args:
        workers: Who writes.
        config: The merged configuration.
        arguments: Command-line arguments besides it.

    Raises:
        GenerationError: If a worker gave up, after all are done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    own = not ray.is_initialized()
    if own:
        ray.init(address=workers.address, include_dashboard=False, logging_level="warning")
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces each stage, and warns of bars that are off
        DataContext.get_current().enable_progress_bars = False
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        shards = ray.data.range(workers.num, override_num_blocks=workers.num).map_batches(
            _written, batch_size=1, compute=TaskPoolStrategy(size=workers.num), num_cpus=workers.cpus,
            num_gpus=(1.0 if has_gpus else 0.0) if workers.gpus is None else workers.gpus,
            max_calls=1,  # a process a shard: what an engine holds is free when it ends
            fn_args=(yaml.safe_dump(config, sort_keys=False), arguments, os.getcwd(), workers.num),
        )  # fmt: skip
        given_up = []
        for row in shards.iter_rows():
            share = Share(**json.loads(row["share"]))
            given_up += [share] if share.error is not None else []
            yield share
        if given_up:
            raise GenerationError(
                f"{len(given_up)} of {workers.num} workers gave up, the first with: {given_up[0].error} What was "
                "written is in the store: run the command again."
            )
    finally:
        if own:
            ray.shutdown()


def require_all(store: Any, before: int, after: int, shares: list[Share]) -> None:
    """Refuses to go on where workers wrote into folders of their own.

    Args:
        store: The folder, as it is called on this machine.
        before: Responses in it when they began.
        after: Responses in it now.
        shares: What the workers said.

    Raises:
        StoreError: If it holds fewer than they wrote.
    """
    written = sum(share.num_responses for share in shares)
    if after < before + written:
        hosts = ", ".join(sorted({share.host for share in shares}))
        raise StoreError(
            f"{store} lacks {before + written - after} of {written} responses that workers on {hosts} wrote: "
            "model.store must be one folder for all, on a shared disk or in a bucket. Join what is on their disks by "
            "`distillkit store merge`."
        )


def _written(batch: dict[str, Any], config: str, arguments: list[str], folder: str, num: int) -> dict[str, Any]:
    """Writes a shard, in a process of a worker."""
    shards = [f"{int(number) + 1}/{num}" for number in batch["id"]]
    return {"share": [json.dumps(vars(_share(shard, config, arguments, folder))) for shard in shards]}


def _share(shard: str, config: str, arguments: list[str], folder: str) -> Share:
    from distillkit.cli.curate import curated  # here, because that module imports this one

    host, start = socket.gethostname(), time.perf_counter()
    if not Path(folder).is_dir():
        return Share(shard, host, error=f"there is no folder {folder}, in which the command was started.")
    os.chdir(folder)
    with tempfile.TemporaryDirectory() as own:
        path = Path(own) / "config.yaml"
        path.write_text(config)
        try:
            given = ["--config", str(path), *arguments, "--workers=null", f"--shard={shard}"]
            num_responses, num_tokens = curated(given)
        except DistillKitError as error:
            return Share(shard, host, error=str(error))
    return Share(shard, host, num_responses, num_tokens, time.perf_counter() - start)

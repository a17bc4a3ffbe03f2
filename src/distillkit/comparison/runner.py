"""Runner of a comparison: each run is a process, and a run that fails or is killed does not stop the rest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import yaml

from distillkit.comparison.outcome import damage, is_done
from distillkit.comparison.plan import Plan, Run
from distillkit.config.files import Config
from distillkit.devices.stopping import PARENT
from distillkit.errors import ConfigError, StoreError, TrainingError
from distillkit.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    FAILED,
    FITTED,
    LOG,
    METRICS,
    SCHEDULES,
    USAGE,
    last_checkpoint,
    metrics_file,
)
from distillkit.storage.atomic import write_atomically


def write_configs(plan: Plan) -> None:
    """Writes each run's `run.yaml`.

    Raises:
        ConfigError: If a run was started with a different configuration.
        StoreError: If a `run.yaml` is damaged.
    """
    for run in (*plan.runs, *filter(None, [plan.warm_start])):
        if run.file.exists():
            old = _read_config(run)
            if old != run.config:
                keys = ", ".join(_differences(old, run.config))
                raise ConfigError(
                    f"{run.method}, seed {run.seed}, was started with a different configuration ({keys}). Remove "
                    f"{run.folder}, or choose another folder with --out."
                )
        else:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.file, yaml.safe_dump(run.config, sort_keys=False))


def _read_config(run: Run) -> Config:
    try:
        content = yaml.safe_load(run.file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise StoreError(f"{run.file} is damaged: remove {run.folder}, or choose another folder with --out.")
    return content


def _differences(old: object, new: object, path: str = "") -> list[str]:
    """The dotted keys in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        nested = (_differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [key for differing_keys in nested for key in differing_keys]
    return [] if old == new else [path]


class Runner:
    """Trains and evaluates the runs of a comparison, several at a time.

    Args:
        plan: The comparison.
        on_message: Called with each progress message, one line of text.
        on_run_end: Called when a run is done or has failed, by one thread at a time.
    """

    def __init__(self, plan: Plan, on_message: Callable[[str], None], on_run_end: Callable[[], object]) -> None:
        self.plan, self.on_message, self.on_run_end = plan, on_message, on_run_end
        self._lock, self._count = threading.Lock(), 0
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._gpus: SimpleQueue[int | None] = SimpleQueue()
        for gpu in plan.gpus or (None,):
            for _ in range(plan.slots):
                self._gpus.put(gpu)
        self.workers = self._gpus.qsize()

    def run_all(self, retry: bool = False) -> None:
        """Executes runs until each is done or has failed. An interrupt kills the running processes, to resume later.

        Args:
            retry: Whether failed runs are started again.

        Raises:
            TrainingError: If the warm start fails.
        """
        for run in (*self.plan.runs, *filter(None, [self.plan.warm_start])):
            for message in discard_damaged(run):
                self.on_message(message)
        open_runs = [run for run in self.plan.runs if not is_done(run.folder)]
        if retry:
            for run in open_runs:
                (run.folder / FAILED).unlink(missing_ok=True)
        open_runs = [run for run in open_runs if not (run.folder / FAILED).exists()]
        self._count = len(self.plan.runs) - len(open_runs)
        if self._count:
            self.on_message(f"{self._count} of {len(self.plan.runs)} runs have already finished")
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                if open_runs:
                    self._warm_start()
                self._curate(open_runs)
                list(pool.map(self._run, open_runs))
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self._children):
                    child.kill()
                raise

    def _warm_start(self) -> None:
        """Trains the student that all methods start from."""
        run, start = self.plan.warm_start, time.perf_counter()
        if run is None or (run.folder / FITTED).exists():
            return
        self.on_message("warm start: training")
        error = self._train(run, None)
        if error:
            raise TrainingError(f"The warm start failed, so no method can start: {error} (see {run.folder / LOG})")
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        self.on_message(f"warm start: {time.perf_counter() - start:.0f} s")

    def _curate(self, open_runs: list[Run]) -> None:
        """Generates the responses that several runs need, in one process after another, before the runs start."""
        if all((run.folder / FITTED).exists() for run in open_runs):
            return
        for run in self.plan.curations():
            marker = self.plan.out / "curated" / f"{run.method}-seed-{run.seed}"
            if marker.exists():
                continue
            start = time.perf_counter()
            status = self._run_command(run, None, "curate", "--config", str(run.file))
            if status == 0:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                outcome = f"{time.perf_counter() - start:.0f} s"
            else:  # the run itself will fail in the same way and report it
                outcome = _reason(run.folder / LOG, status)
            self.on_message(f"responses that several methods need, seed {run.seed}: {outcome}")

    def _run(self, run: Run) -> None:
        gpu = self._gpus.get()
        start = time.perf_counter()
        try:
            error = self._train(run, gpu) or self._evaluate(run, gpu)
        finally:
            self._gpus.put(gpu)
        if self._stopped:  # killed by the interrupt: not a failure of the run
            return
        with self._lock:
            if error:
                write_atomically(run.folder / FAILED, json.dumps({"error": error}) + "\n")
            elif not self.plan.keep:
                shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
            self._count += 1
            message = f"failed: {error}" if error else f"{_format_metrics(run)} ({time.perf_counter() - start:.0f} s)"
            self.on_message(f"[{self._count}/{len(self.plan.runs)}] {run.method}, seed {run.seed}: {message}")
            self.on_run_end()

    def _train(self, run: Run, gpu: int | None) -> str:
        """Trains a run, from its last checkpoint if there is one; returns the error, empty on success.

        Only the mark that the run itself writes says that it is complete, whatever the exit status.
        """
        if (run.folder / FITTED).exists():
            return ""
        resume = ["--ckpt_path", "last"] if (run.folder / CONFIG).exists() else []
        status = self._run_command(run, gpu, "fit", "--config", str(run.file), *resume)
        if status:
            return _reason(run.folder / LOG, status)
        return "" if (run.folder / FITTED).exists() else f"`fit` ended without its mark {FITTED}"

    def _evaluate(self, run: Run, gpu: int | None) -> str:
        """Evaluates the last checkpoint of a run; returns the error, empty on success."""
        output = ["--out", str(run.folder / EVALUATION)]
        checkpoint = ["--split", self.plan.split, "--ckpt_path", str(last_checkpoint(run.folder))]
        status = self._run_command(run, gpu, "evaluate", "--config", str(run.file), *output, *checkpoint)
        if status:
            return _reason(run.folder / LOG, status)
        return "" if is_done(run.folder) else f"`evaluate` ended without a whole {METRICS}"

    def _run_command(self, run: Run, gpu: int | None, *arguments: str) -> int:
        """Runs `distillkit` with these arguments, with its output in the run's log; returns the exit status."""
        env = os.environ | {PARENT: str(os.getpid()), "PYTHONPATH": os.pathsep.join(module_folders())}
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        is_alone = run is self.plan.warm_start or arguments[0] == "curate"
        if self.workers > 1 and not is_alone:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        command = [sys.executable, "-P", "-m", "distillkit", *arguments]
        with (run.folder / LOG).open("a") as log:
            log.write(f"$ distillkit {' '.join(arguments)}\n")
            log.flush()
            # In a new session: an interrupt reaches this process only, which then kills its children.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
            self._children.add(child)
            if self._stopped:
                child.kill()
            try:
                return child.wait()
            finally:
                child.kill()
                self._children.discard(child)


def module_folders() -> list[str]:
    """Folders that this process imports from, without those of each Python process.

    A run needs them: a part may be in a file of the working folder, which `python -m` and notebooks import from.
    """
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
    folders = [Path(path).absolute() for path in sys.path]
    return [str(path) for path in dict.fromkeys(folders) if path.is_dir() and not str(path).startswith(installed)]


def discard_damaged(run: Run) -> list[str]:
    """Removes the damaged files of a run, and the marks of what has to be repeated for them.

    Returns:
        A message for each damaged file.
    """
    damaged = damage(run.folder)
    fitted, evaluated = run.folder / FITTED, metrics_file(run.folder)
    for path in damaged:
        path.unlink()
    if damaged.keys() & {run.folder / USAGE, run.folder / SCHEDULES} or (
        evaluated in damaged and not last_checkpoint(run.folder).exists()
    ):
        fitted.unlink(missing_ok=True)
    if not fitted.exists():
        evaluated.unlink(missing_ok=True)
    return list(damaged.values())


def _format_metrics(run: Run) -> str:
    metrics = json.loads(metrics_file(run.folder).read_text())["metrics"]
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def _reason(log: Path, status: int) -> str:
    """The reason why a process failed: the last error line of its log, or the signal that killed it."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no message"])[-1][:500]

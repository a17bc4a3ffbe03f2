"""The runs of a comparison, as processes: each may fail, or be killed, and the others go on."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from distillkit.cli.compare_plan import Plan, Run
from distillkit.comparison.outcome import EVALUATION, FAILED, FITTED
from distillkit.errors import ConfigError, TrainingError

LOG = "log.txt"
"""File in a run's folder with what its processes said."""


def write_configs(plan: Plan) -> None:
    """Writes each run's `run.yaml`.

    Raises:
        ConfigError: If a run was begun with another configuration.
    """
    for run in (*plan.runs, *filter(None, [plan.warm_start])):
        if run.file.exists():
            old = yaml.safe_load(run.file.read_text())
            if old != run.config:
                keys = ", ".join(_differences(old, run.config))
                raise ConfigError(
                    f"{run.method}, seed {run.seed}, was begun with another configuration ({keys}): remove "
                    f"{run.folder}, or name another folder by --out."
                )
        else:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.file.write_text(yaml.safe_dump(run.config, sort_keys=False))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The keys in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [one for key in keys for one in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [path]


class Runner:
    """Has runs trained and measured, several at a time.

    Args:
        plan: The comparison.
        say: Shows a line.
        finished: Called, in one thread at a time, when a run is done or has failed.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None], finished: Callable[[], object]) -> None:
        self.plan, self.say, self.finished = plan, say, finished
        self._lock, self._count = threading.Lock(), 0
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._gpus: SimpleQueue[int | None] = SimpleQueue()
        for gpu in plan.gpus or (None,):
            for _ in range(plan.slots):
                self._gpus.put(gpu)
        self.workers = self._gpus.qsize()

    def all(self, retry: bool = False) -> None:
        """Goes on until each run is done or has failed. An interrupt ends what is under way, which can go on later.

        Args:
            retry: Whether those that failed are tried again.

        Raises:
            TrainingError: If the warm start fails.
        """
        open_runs = [run for run in self.plan.runs if not is_done(run)]
        if retry:
            for run in open_runs:
                (run.folder / FAILED).unlink(missing_ok=True)
        open_runs = [run for run in open_runs if not (run.folder / FAILED).exists()]
        self._count = len(self.plan.runs) - len(open_runs)
        if self._count:
            self.say(f"{self._count} of {len(self.plan.runs)} runs are there already")
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
        """Trains the student that all methods begin with."""
        run, start = self.plan.warm_start, time.perf_counter()
        if run is None or (run.folder / FITTED).exists():
            return
        self.say("warm start: training")
        error = self._fitted(run, None)
        if error:
            raise TrainingError(
                f"The warm start failed, and no method can begin: {error} ({run.folder / LOG} says more)"
            )
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        self.say(f"warm start: {time.perf_counter() - start:.0f} s")

    def _curate(self, open_runs: list[Run]) -> None:
        """Has what several runs need written before them, by one process after the other."""
        if all((run.folder / FITTED).exists() for run in open_runs):
            return
        for run in self.plan.curations():
            marker = self.plan.out / "curated" / f"{run.method}-seed-{run.seed}"
            if marker.exists():
                continue
            start = time.perf_counter()
            status = self._process(run, None, "curate", "--config", str(run.file))
            if status == 0:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                self.say(f"responses that several methods need, seed {run.seed}: {time.perf_counter() - start:.0f} s")
            else:  # the run itself will meet the fault, and be the row that says so
                self.say(f"responses that several methods need, seed {run.seed}: {_reason(run.folder / LOG, status)}")

    def _run(self, run: Run) -> None:
        gpu = self._gpus.get()
        start = time.perf_counter()
        try:
            error = self._fitted(run, gpu) or self._evaluated(run, gpu)
        finally:
            self._gpus.put(gpu)
        if self._stopped:  # what ended it was no fault of its own
            return
        with self._lock:
            if error:
                (run.folder / FAILED).write_text(json.dumps({"error": error}) + "\n")
            elif not self.plan.keep:
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            self._count += 1
            said = f"failed: {error}" if error else f"{_figures(run)} ({time.perf_counter() - start:.0f} s)"
            self.say(f"[{self._count}/{len(self.plan.runs)}] {run.method}, seed {run.seed}: {said}")
            self.finished()

    def _fitted(self, run: Run, gpu: int | None) -> str:
        """Trains, from the last checkpoint if there is one; the error, or nothing."""
        if (run.folder / FITTED).exists():
            return ""
        start = time.time()
        resume = ["--ckpt_path", "last"] if (run.folder / "config.yaml").exists() else []
        status = self._process(run, gpu, "fit", "--config", str(run.file), *resume)
        if status:
            return _reason(run.folder / LOG, status)
        (run.folder / FITTED).write_text(json.dumps({"wall_seconds": round(time.time() - start, 1)}) + "\n")
        return ""

    def _evaluated(self, run: Run, gpu: int | None) -> str:
        out, split = str(run.folder / EVALUATION), self.plan.split
        last = ["--ckpt_path", str(run.folder / "checkpoints" / "last.ckpt")]
        status = self._process(
            run, gpu, "evaluate", "--config", str(run.file), "--out", out, "--split", split, *last
        )  # fmt: skip
        return _reason(run.folder / LOG, status) if status else ""

    def _process(self, run: Run, gpu: int | None, *arguments: str) -> int:
        """Runs the command to its end; its exit status."""
        env = dict(os.environ)
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        is_alone = run is self.plan.warm_start or arguments[0] == "curate"
        if self.workers > 1 and not is_alone:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        command = [sys.executable, "-c", _CHILD, str(os.getpid()), *arguments]
        with (run.folder / LOG).open("a") as log:
            log.write(f"$ distillkit {' '.join(arguments)}\n")
            log.flush()
            # A session of its own: what interrupts us is for us to pass on.
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


def is_done(run: Run) -> bool:
    """Whether a run is trained and measured."""
    return (run.folder / EVALUATION / "evaluation.json").exists()


_CHILD = "from distillkit.cli import compare_runs; compare_runs.child()"


def child() -> None:
    """The command as a process of a comparison, which dies with it (on Linux).

    A killed comparison leaves no run behind, which the next one would meet in the same folder.
    """
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it was killed before that
            sys.exit(1)
    from distillkit.cli.main import main

    sys.exit(main(arguments))


def _figures(run: Run) -> str:
    found = json.loads((run.folder / EVALUATION / "evaluation.json").read_text())["figures"]
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def _reason(log: Path, status: int) -> str:
    """Why a process ended: its last line, or the signal that killed it."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no message"])[-1][:500]

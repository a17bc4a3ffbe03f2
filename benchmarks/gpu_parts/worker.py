"""The child process: runs one case after the other, so that imports and compiled kernels are shared.

Each line of the standard input is a case. What happens is one line of JSON per event at the end of the part's file:
`begin`, `row` and `end`. A process that is killed has thus reported all but the case that it was in.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_parts.cases import OUT_OF_TIME, CaseError, LeftOutError, OutOfTimeError, Settings

LEAK = 2 * 2**30
"""Bytes of the device that may be in use after a case: above that, the next one gets a new process."""


def main() -> None:
    """Runs cases until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent
    for line in sys.stdin:
        if not run(json.loads(line)):
            return


def run(job: dict[str, Any]) -> bool:
    """Runs a case; whether the process is fit for another one."""
    redirect(Path(job["log"]))
    events, case = Path(job["events"]), job["case"]
    record(events, event="begin", case=case)
    start = time.perf_counter()
    status, reason, detail = "passed", "", ""
    try:
        provoke(job["fault"])
        module, _, name = job["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        settings = Settings(**job["settings"])
        left = max(1.0, settings.seconds - (time.perf_counter() - start))  # imports take their time
        for row in function(replace(settings, seconds=left), **job["arguments"]):
            record(events, event="row", case=case, row=row)
    except LeftOutError as error:
        status, reason = "left out", str(error)
    except OutOfTimeError as error:
        status, reason = "not run", f"{OUT_OF_TIME}: {error}"
    except CaseError as error:
        status, reason = "failed", str(error)
    except Exception as error:  # whatever a case raises is its result
        status, reason, detail = "failed", summary(error), traceback.format_exc()
        print(detail, flush=True)
        traceback.clear_frames(error.__traceback__)  # they hold tensors
    seconds = time.perf_counter() - start
    is_fit = release_device()
    sys.stdout.flush()
    record(events, event="end", case=case, status=status, reason=reason, detail=detail, seconds=seconds, fit=is_fit)
    return is_fit


def summary(error: BaseException) -> str:
    """An error in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def record(events: Path, **event: Any) -> None:
    """Appends an event."""
    with events.open("a") as file:
        file.write(json.dumps(event, default=str) + "\n")


def redirect(log: Path) -> None:
    """Sends what this process and its commands print to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def provoke(fault: str) -> None:
    """Fails in the way that was ordered, so that the report can be tried."""
    if fault == "fail":
        raise RuntimeError("made to fail by --fail")
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)


def release_device() -> bool:
    """Frees what the case left on the device; whether the device still works and is all but empty."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.cuda.memory_allocated() < LEAK)
    except RuntimeError as error:  # after an illegal access every call of this process fails
        print("the device is of no more use to this process:", error, flush=True)
        return False


if __name__ == "__main__":
    main()

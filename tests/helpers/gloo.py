"""Runs a script as several ranks that talk over gloo."""

import json
import subprocess
import sys

_START = """
import json, os, sys
import torch.distributed as dist
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
"""
# No clean-up: now and then gloo's threads bring the interpreter down while it ends, when all has been said.
_END = """
print(json.dumps(found), flush=True)
dist.barrier()
os._exit(0)
"""


def run_ranks(script, folder, world=2, timeout=180):
    """Runs `script` on each rank, where it has `rank` and `world`; returns each rank's variable `found`."""
    command = [sys.executable, "-W", "ignore", "-c", _START + script + _END]
    jobs, outputs, complaints = [], [folder / f"rank-{rank}.out" for rank in range(world)], []
    for rank, out in enumerate(outputs):
        complaints.append(out.with_suffix(".err"))
        arguments = [str(rank), str(world), str(folder / "meet")]
        # Files, because a pipe that nobody reads yet would hold a rank up.
        with out.open("w") as file, complaints[-1].open("w") as errors:
            jobs.append(subprocess.Popen([*command, *arguments], stdout=file, stderr=errors))
    try:
        for job in jobs:
            job.wait(timeout)
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert [job.returncode for job in jobs] == [0] * world, "\n".join(error.read_text() for error in complaints)
    return [json.loads(out.read_text().splitlines()[-1]) for out in outputs]

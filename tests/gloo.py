"""Runs a script as several ranks that talk over gloo."""

import json
import subprocess
import sys

_START = """
import json, sys
import torch.distributed as dist
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
"""
_END = """
print(json.dumps(found))
dist.destroy_process_group()
"""


def run_ranks(script, folder, world=2, timeout=60):
    """What `script` leaves in `found` on each rank; it has `rank` and `world`."""
    command = [sys.executable, "-W", "ignore", "-c", _START + script + _END]
    jobs = [
        subprocess.Popen([*command, str(rank), str(world), str(folder / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        outputs = [job.communicate(timeout=timeout)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
            job.stdout.close()
    assert [job.returncode for job in jobs] == [0] * world
    return [json.loads(output.splitlines()[-1]) for output in outputs]

"""Program that test_cached.py runs on each of two ranks: a cached teacher prepares the rows of a round."""

import json
import os
from pathlib import Path

import torch
from torch import distributed

from distillkit.data.collate import collate
from distillkit.teachers import cached
from distillkit.teachers.cached import CachedTeacher
from distillkit.types import Row
from helpers.scores import Counting

ROWS = [Row(tuple(range(n, 2 * n)), (False,) + (True,) * (n - 1), "teacher", str(n)) for n in range(3, 12)]


def share(source: str, folder: str) -> None:
    """Leaves what the rank scored, in the first round and in a second one with known rows, in `RANK.json`."""
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    cached.BATCH_TOKENS["cpu"] = 24
    inner = Counting(source)
    teacher = CachedTeacher(inner, folder=folder)
    teacher.setup(torch.device("cpu"))
    teacher.prepare(ROWS)
    first = [key.hex() for key in inner.keys]
    teacher.prepare(ROWS[:2])
    total = float(teacher.score(collate(ROWS, 1)).hidden.double().sum())
    result = {"first": first, "again": [key.hex() for key in inner.keys[len(first) :]], "sum": total}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()

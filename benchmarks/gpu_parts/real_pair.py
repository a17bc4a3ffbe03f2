"""The quickstart's run on the device, within a time, beside the figures of the CPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distillkit.run_folder import USAGE, read_metrics
from gpu_parts.cases import CaseError, LeftOutError, OutOfTimeError, Row, Settings
from gpu_parts.commands import DISTILLKIT, ROOT, run_command
from gpu_parts.tiny_pair import save_tiny_pair

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LONGEST = 120.0
"""Seconds of training."""
STARTING = 30.0
"""Seconds that loading and the first validation take, at a guess."""
CPU = {"kl": (0.65, 0.40), "acceptance": (0.62, 0.73), "rouge_l": (27.6, 37.2)}
"""Before and after the quickstart on a CPU, by README.md."""
TEXTS = {"kl": "KL {:.2f}→{:.2f}", "acceptance": "acc. {:.2f}→{:.2f}", "rouge_l": "R-L {:.1f}→{:.1f}"}


def train(settings: Settings, ready: bool = True) -> Iterator[Row]:
    """Trains the pair; held-out figures before and after.

    Args:
        settings: Device, model and time.
        ready: Whether there is a model.

    Raises:
        LeftOutError: If there is none.
        CaseError: If the command fails.
        OutOfTimeError: If time was up before training had ended once.
    """
    if not ready:
        raise LeftOutError("needs --real")
    folder = Path(settings.out).resolve() / "real"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu.yaml"
    # Validations are not in the budget: they take up to half of its time again.
    seconds = min(LONGEST, (settings.seconds - STARTING) / 1.5)
    budget = {"steps": 2} if settings.tiny else {"seconds": max(10.0, seconds)}
    file.write_text(yaml.safe_dump(overrides(settings, folder, budget), sort_keys=False))
    command = [*DISTILLKIT, "fit", "--config", str(QUICKSTART), "--config", str(file)]
    status, is_over = run_command(command, settings.seconds, ROOT)
    series = read_metrics(folder / "run")
    if status and not is_over:
        raise CaseError(f"distillkit fit ended with exit status {status}")
    texts = []
    for name, (before, after) in CPU.items():
        points = [value for _, value in series.get(f"val/{name}", [])]
        if len(points) < 2 and is_over:
            raise OutOfTimeError("no validation after the first")
        if len(points) < 2:
            raise CaseError(f"the run has {len(points)} values of val/{name}, not one before and one after")
        texts.append(TEXTS[name].format(points[0], points[-1]))
        yield {"metric": name, "before": points[0], "after": points[-1], "cpu_before": before, "cpu_after": after}
    yield speed(folder / "run", series, texts)


def speed(folder: Path, series: dict[str, list[tuple[int, float]]], texts: list[str]) -> Row:
    """The tokens that the run trained on, and its speed."""
    usage = json.loads((folder / USAGE).read_text()) if (folder / USAGE).exists() else {}
    rates = sorted(value for _, value in series.get("train/tokens_per_s", []))
    row: Row = {
        "steps": max((step + 1 for step, _ in series.get("train/loss", [])), default=0),
        "trained_tokens": usage.get("spent_tokens"),
        "seconds": usage.get("spent_seconds"),
        "curation_seconds": usage.get("curation_seconds"),
        "tokens_per_second": rates[len(rates) // 2] if rates else None,
    }
    rate = f", {row['tokens_per_second'] / 1e3:.1f}k tok/s" if rates else ""
    return row | {"figure": ", ".join(texts) + rate}


def overrides(settings: Settings, folder: Path, budget: dict[str, float]) -> dict[str, Any]:
    """Settings that differ from the quickstart."""
    config: dict[str, Any] = {
        "trainer": {
            "accelerator": {"cuda": "gpu", "cpu": "cpu"}[settings.device],
            "max_epochs": -1,
            "default_root_dir": str(folder / "run"),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": ["Throughput", "Answers", {"class_path": "Budget", "init_args": budget}],
        },
        "model": {"generator": {"init_args": {"progress": False}}},
    }
    if settings.real is None:
        return merged(config, tiny(save_tiny_pair(Path(settings.out) / "scratch" / "tiny")))
    model = {"teacher": {"init_args": {"source": settings.real}}, "student": {"source": settings.real}}
    return merged(config, merged(few_prompts() if settings.tiny else {}, {"model": model}))


def tiny(source: str) -> dict[str, Any]:
    """A model of a few layers, few prompts and short responses."""
    model = {"teacher": {"init_args": {"source": source}}, "student": {"source": source, "keep_layers": [0, 1]}}
    return merged(few_prompts(), {"model": model})


def few_prompts() -> dict[str, Any]:
    """Few prompts and short responses."""
    curators = {name: {"init_args": {"sampling": {"max_new_tokens": 4}}} for name in ("chosen", "rejected")}
    prompts = ROOT / "configs" / "prompts"
    return {
        "data": {
            "train": {"path": str(prompts / "quickstart-train.jsonl"), "limit": 8},
            "val": {"path": str(prompts / "quickstart-heldout.jsonl"), "limit": 4},
        },
        "model": {"answers": {"max_new_tokens": 4}, "curator": {"init_args": curators}},
    }


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, key by key."""
    result = dict(below)
    for key, value in above.items():
        lower = result.get(key)
        result[key] = merged(lower, value) if isinstance(lower, dict) and isinstance(value, dict) else value
    return result

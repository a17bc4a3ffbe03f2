"""The verbs that `kills.py` kills: what is run, what must be whole after a kill, and what must be there in the end."""

import json
from collections.abc import Callable
from pathlib import Path

from distillkit.cli.main import main
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.types import Prompt, Response, Sampling
from kill_parts import comparisons
from kill_parts.runs import Case, config, damaged, export_faults, remove, responses, run_faults, weights

STORES, SHARDS = 3, 12
"""Stores that are merged, and shards of each."""


def fit(root: Path) -> Case:
    """Training, with a checkpoint after each step and an export."""
    run = root / "fit"
    file = config(root, run)

    def arguments() -> list[str]:
        resume = ["--ckpt_path", "last"] if (run / "config.yaml").exists() else []
        return ["fit", "--config", file, *resume]

    return Case(
        root / "fit.log",
        arguments,
        lambda: remove(run),
        lambda: run_faults(run),
        lambda: (weights(run / "export"), responses(run / "responses"), (run / "fitted.json").exists()),
    )


def curate(root: Path) -> Case:
    """The responses of the first round."""
    run = root / "curate"
    file = config(root, run)
    return Case(
        root / "curate.log",
        lambda: ["curate", "--config", file],
        lambda: remove(run),
        lambda: damaged(run),
        lambda: responses(run / "responses"),
    )


def evaluate(root: Path) -> Case:
    """The measures of the untrained student, with the responses of the teacher."""
    run = root / "evaluate"
    file, out = config(root, run), root / "evaluation"

    def content() -> object:
        result = json.loads((out / "evaluation.json").read_text())
        lines = (out / "answers.jsonl").read_text().splitlines()
        return result["metrics"], sorted(lines), len(lines) == result["num_prompts"]

    return Case(
        root / "evaluate.log",
        lambda: ["evaluate", "--config", file, "--out", str(out), "--overwrite"],
        lambda: remove(run, out),
        lambda: [*damaged(run), *damaged(out)],
        content,
    )


def merge(root: Path) -> Case:
    """Several stores of many shards into one."""
    sources, target = [root / f"part-{number}" for number in range(STORES)], root / "merged"
    provenance = Provenance("teacher", "0" * 16, Sampling(max_new_tokens=8), 0)
    for number, source in enumerate(sources):
        store = ResponseStore(source)
        for shard in range(SHARDS):
            names = [f"{number}-{shard}-{index}" for index in range(40)]
            prompts = [Prompt(name, ({"role": "user", "content": name},), (1,)) for name in names]
            answers = [Response(name, tuple(range(index)), name, "stop") for index, name in enumerate(names)]
            store.write(provenance, answers, prompts, "Generator")
    return Case(
        root / "merge.log",
        lambda: ["store", "merge", str(target), *map(str, sources)],
        lambda: remove(target),
        lambda: damaged(target),
        lambda: responses(target),
    )


def export(root: Path) -> Case:
    """The student of a checkpoint as a folder."""
    run, target = root / "trained", root / "exported"
    saved = run / "checkpoints" / "last.ckpt"
    file = config(root, run)

    def arguments() -> list[str]:
        if not saved.exists():  # in this process, once
            return ["fit", "--config", file]
        return ["export", str(saved), "--to", str(target)]

    def complete() -> bool:
        return (target / "model.safetensors").exists()

    def run_or_keep(values: list[str]) -> int:
        """Exports, unless it is done: a complete folder is not written again."""
        status = main(values)
        return main(arguments()) if values[0] == "fit" and not status else status

    def faults() -> list[str]:
        result = export_faults(target)
        if complete():
            remove(target)
        return result

    return Case(root / "export.log", arguments, lambda: remove(target), faults, lambda: weights(target), run_or_keep)


def store_export(root: Path) -> Case:
    """The responses of a store as lines."""
    source, target = root / "part-0", root / "lines.jsonl"
    if not source.exists():
        merge(root)
    return Case(
        root / "store-export.log",
        lambda: ["store", "export", str(source), str(target), "--writer", "teacher"],
        lambda: target.unlink(missing_ok=True),
        lambda: ["half a file of lines"] if target.exists() and not target.read_text().endswith("\n") else [],
        lambda: target.read_text(),
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "fit": fit,
    "curate": curate,
    "evaluate": evaluate,
    "merge": merge,
    "export": export,
    "store export": store_export,
    "report": comparisons.report,
    "compare": comparisons.compare,
}

"""What the cases of `kills.py` share: tiny models, a run's configuration, and what a killed process has left."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from distillkit.cli.main import main
from distillkit.storage.index import Catalog
from distillkit.storage.responses import ResponseStore
from distillkit.storage.rows import open_store, stored_rows
from distillkit.storage.verify import verify
from distillkit.testing.tiny import tiny_model, tiny_tokenizer

TRAIN, HELD_OUT = 8, 3


@dataclass(frozen=True)
class Case:
    """A verb.

    Args:
        log: What the process prints.
        arguments: Gives the command's arguments, which may depend on what is there.
        reset: Makes all as before the first start.
        faults: What is wrong with the files that a killed process has left.
        content: What is there at the end, in a form that `==` compares.
        run: Runs the command.
    """

    log: Path
    arguments: Callable[[], list[str]]
    reset: Callable[[], None]
    faults: Callable[[], list[str]]
    content: Callable[[], object]
    run: Callable[[list[str]], int] = main


def part(name: str, **settings: Any) -> dict[str, Any]:
    """A part of a configuration."""
    return {"class_path": name, "init_args": settings}


def prepare(root: Path) -> None:
    """Writes tiny models, prompts, a configuration and a comparison."""
    for name, layers, seed in (("teacher", 3, 1), ("student", 2, 2)):
        tokenizer = tiny_tokenizer()
        tiny_model(len(tokenizer), layers=layers, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, count in (("train", TRAIN), ("val", HELD_OUT)):
        rows = [{"prompt": f"What is {'very ' * (number % 4)}{number}, {name}?"} for number in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(root: Path, run: Path) -> str:
    """Writes the configuration of a run; its path."""
    content = {
        "seed_everything": 1,
        "trainer": {
            **dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False),
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "max_epochs": 2,
            "default_root_dir": str(run),
            "callbacks": [part("RunCheckpoint", every_n_steps=1, keep=2), part("Export"), part("Answers", shown=0)],
        },
        "model": common_model(root),
        "data": {"train": str(root / "train.jsonl"), "val": str(root / "val.jsonl"), "batch_size": 2},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return str(path)


def common_model(root: Path) -> dict[str, Any]:
    """The models of a run, whose teacher writes short responses a few at a time."""
    return {
        "student": {"source": str(root / "student")},
        "teacher": part("TransformersTeacher", source=str(root / "teacher"), dtype="float32"),
        "loss": part("ForwardKL"),
        "curator": part("TeacherCurator", sampling={"max_new_tokens": 8}, rounds="epoch"),
        "generator": part("TransformersGenerator", batch_size=2, progress=False),
        "answers": {"temperature": 0.0, "max_new_tokens": 8},
        "optimizer": part("torch.optim.AdamW", lr=1e-2),
    }


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────────


def damaged(folder: Path) -> list[str]:
    """Faults of the files under their final names in a folder."""
    if not folder.exists():
        return []
    faults = [state.problem for state in verify(str(folder)) if state.problem]
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_symlink() or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.name == "answers.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                keys = Counter((row["prompt_id"], row.get("step"), row.get("split")) for row in rows)
                faults += [f"{path}: a line is there twice" for count in keys.values() if count > 1][:1]
        except ValueError as error:
            faults.append(f"{path}: {error}")
    return faults


def run_faults(run: Path) -> list[str]:
    """Faults of a run that was killed."""
    faults = damaged(run)
    if (run / "fitted.json").exists() and not (run / "export" / "config.json").exists():
        faults.append("called done without its export")
    if (run / "export").exists():
        faults += export_faults(run / "export")
    return faults


def export_faults(folder: Path) -> list[str]:
    """Faults of an exported model."""
    if not folder.exists():
        return []
    names = {path.name for path in folder.iterdir()}
    missing = {"config.json", "model.safetensors", "tokenizer.json"} - names
    return [f"{folder} lacks {sorted(missing)}"] if missing and names else []


def weights(folder: Path) -> object:
    """The tensors of an exported model."""
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def responses(folder: Path) -> list[tuple[object, ...]]:
    """The responses in a store; each must be there once."""
    catalog: Catalog = open_store(str(folder))
    rows = [
        (row["writer"], row["round"], row["prompt_id"], tuple(row["token_ids"]))
        for row in stored_rows(catalog, list(catalog.provenances))
    ]
    assert len(set(rows)) == len(rows)
    assert sum(shard["responses"] for shard in ResponseStore(folder).shards()) == len(rows), "one is there twice"
    return sorted(rows)


def remove(*folders: Path) -> None:
    """Removes folders."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

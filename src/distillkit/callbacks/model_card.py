"""The model card of an exported student."""

import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from torch import nn

from distillkit.types import Sampling

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule

_NOT_SETTINGS = ("training", "needs_reference", "needs_teacher")
_NAMES = {
    "val/kl": "KL(teacher‖student), nats per token",
    "val/nll": "student's NLL of the reference responses, nats per token",
    "val/acceptance": "expected speculative acceptance, Σ min(p, q)",
    "val/rouge_l": "ROUGE-L of greedy answers against the reference, %",
    "val/gold_nll": "student's NLL of the data's own answers, nats per token",
    "val/gold_rouge_l": "ROUGE-L of greedy answers against the data's own, %",
    "val/loss": "training loss on the data's own held-out answers",
}


def model_card(module: "RunModule", trainer: Trainer) -> str:
    """A model card in the format of the Hugging Face hub: method, models, data, metrics.

    Args:
        module: The trained DistillModule.
        trainer: Its trainer.
    """
    student = module.student_spec.source
    teacher = None if module.teacher is None else module.teacher.display_name
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it through a connector
    summary = inspect.getdoc(type(module.loss)) or ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, distillkit]",
        "---",
        "",
        f"# {trainer.default_root_dir.rstrip('/').rpartition('/')[2]}",
        "",
        f"Distilled with distillkit {metadata.version('distillkit')}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| student | `{student}`{_pruned(module.student_spec.keep_layers)} |",
        f"| teacher | {f'`{teacher}`' if teacher else 'none'} |",
        f"| loss | `{_described(module.loss)}` |",
        f"| responses | `{_described(module.curator)}` |",
        f"| prompts | {_data(datamodule)} |",
        f"| training | {trainer.global_step} steps, {trainer.current_epoch} epochs, precision {trainer.precision} |",
        "",
        summary.splitlines()[0] if summary else "",
        "",
    ]
    if module.history:
        validations = [module.history[0], module.history[-1]][-len(module.history) :]
        head = " | ".join(_time(int(values["step"]), trainer.global_step) for values in validations)
        lines += ["## Held-out metrics", "", f"| metric | {head} |", "| --- |" + " --- |" * len(validations)]
        for name in validations[-1]:
            if name != "step" and name in validations[0]:
                row = " | ".join(f"{values[name]:.4g}" for values in validations)
                lines.append(f"| {_NAMES.get(name, name)} | {row} |")
    lines += ["", "The licences of the student's base model, the teacher and the prompts apply to this model.", ""]
    return "\n".join(lines)


def _time(step: int, steps: int) -> str:
    """Heading of a validation at `step` of a training of `steps` steps: before, after, or the step."""
    return "before" if step == 0 else "after" if step == steps else f"at step {step} of {steps}"


def _pruned(layers: list[int] | None) -> str:
    return "" if layers is None else f", {len(layers)} layers kept: {', '.join(map(str, layers))}"


def _described(part: nn.Module) -> str:
    """A part as `Name(setting=value, …)`, with its nested parts."""
    plain = {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_") and name not in _NOT_SETTINGS and isinstance(value, int | float | str | Sampling)
    }
    arguments = [f"{name}={value}" for name, value in plain.items()]
    arguments += [f"{name}={_described(child)}" for name, child in part.named_children()]
    return f"{type(part).__name__}({', '.join(arguments)})"


def _data(datamodule: Any) -> str:
    if datamodule is None or not hasattr(datamodule, "sources"):
        return "not recorded"
    counts = {name: len(prompts) for name, prompts in datamodule.prompts.items()}
    used = {name: getattr(source, "path", source) for name, source in datamodule.sources.items() if name in counts}
    return "; ".join(f"{name}: {counts[name]} from `{source}`" for name, source in used.items())

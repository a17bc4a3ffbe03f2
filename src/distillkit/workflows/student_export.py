"""Export of a checkpoint's student as a folder that transformers loads."""

from pathlib import Path
from typing import Literal

from lightning import LightningDataModule, LightningModule

from distillkit.callbacks.model_card import TrainedRun, first_line, model_card
from distillkit.data.chat_templates import TEACHER
from distillkit.errors import ConfigError, ModelError
from distillkit.evaluation.examples import examples
from distillkit.models.export import check_adapter_only, export_model
from distillkit.models.loading import DTYPES
from distillkit.models.student import Student
from distillkit.run_folder import CHECKPOINTS
from distillkit.training.checkpoint import Checkpoint
from distillkit.workflows.checkpoints import choose_checkpoint

_MODEL, _DATA = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY


def export(
    source: str | Path,
    folder: str | Path,
    student: Student | None = None,
    which: Literal["best", "last"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    adapter_only: bool = False,
    name: str | None = None,
) -> Path:
    """Writes the student of a run or a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    No other part of the run is needed: neither the data nor the teacher, unless its chat template is the student's.

    Args:
        source: A checkpoint, or the folder of a run.
        folder: Target folder; it must be empty or not exist.
        student: The student's settings, if its source has moved; None is those of the run.
        which: The checkpoint of a run, `best` or `last`; None is the best where a callback monitors a metric, and
            otherwise the last.
        dtype: Type of the stored weights; None is the type in which the student's source stores its weights.
        adapter_only: Whether the LoRA adapter alone is written; otherwise it is merged.
        name: The name under which the model card loads the student, such as a hub id; None is the folder.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is no such checkpoint, the folder contains files, or there is no adapter to write alone.
        ModelError: If the checkpoint is damaged or of another kind, or the student can't be loaded.
    """
    target = Path(folder)
    require_new(target)
    if adapter_only and dtype is not None:
        raise ConfigError("dtype is that of a merged model: leave it out, or adapter_only.")
    path, _ = choose_checkpoint(source, which)
    saved = Checkpoint.read(path)
    spec = student or saved.setting(_MODEL, "student")
    if adapter_only:
        check_adapter_only(spec, "adapter_only")
    teacher = saved.setting(_MODEL, "teacher").tokenizer() if spec.chat_template == TEACHER else None
    model, tokenizer = saved.load_student(spec), spec.tokenizer(teacher, pads=False)
    card = model_card(_trained_run(path, saved), name or target.name, tokenizer, adapter_only)
    stored = None if dtype is None else DTYPES[dtype]
    export_model(model, spec, tokenizer, target, stored, adapter_only, {"README.md": card})
    return target


def require_new(folder: Path) -> None:
    """Refuses a target folder that contains files.

    Raises:
        ConfigError: If it does, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty. Name a new folder: nothing is overwritten.")


def _trained_run(path: Path, saved: Checkpoint) -> TrainedRun:
    """The run of a checkpoint, for the model card."""
    ours = saved.content["distillkit"]
    settings = ours.get("settings", {})
    try:
        summary = first_line(saved.setting(_MODEL, "loss"))
    except ModelError:  # of a class that is not installed any more
        summary = ""
    run = path.resolve().parent.parent if path.parent.name == CHECKPOINTS else None
    return TrainedRun(
        name=path.stem if run is None else run.name,
        model=saved.content[_MODEL],
        data=saved.content.get(_DATA),
        step=saved.content["global_step"],
        epochs=ours.get("place", {}).get("epoch", saved.content["epoch"]),
        precision=settings.get("trainer.precision", "not recorded"),
        seed=settings.get("seed_everything"),
        history=ours.get("history", []),
        num_prompts=ours.get("num_prompts", {}),
        loss_summary=summary,
        examples=[] if run is None else examples(run, step=saved.content["global_step"]),
    )

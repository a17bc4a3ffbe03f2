"""Export of a checkpoint's student as a folder that transformers loads."""

from pathlib import Path

from lightning import LightningModule

from distillkit.data.chat_templates import TEACHER
from distillkit.errors import ConfigError
from distillkit.models.export import export_model
from distillkit.models.student import Student
from distillkit.training.checkpoint import Checkpoint


def export(checkpoint: str | Path, folder: str | Path, student: Student | None = None) -> Path:
    """Writes the student of a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    No other part of the run is needed: neither the data nor the teacher, unless its chat template is the student's.

    Args:
        checkpoint: The checkpoint.
        folder: Target folder; it must be empty or not exist.
        student: The student's settings, if its source has moved; None is those of the run.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is no such checkpoint, or the folder contains files.
        ModelError: If the checkpoint is damaged or of another kind, or the student can't be loaded.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} is not empty. Name a new folder: nothing is overwritten.")
    saved = Checkpoint.read(checkpoint)
    spec = student or saved.setting(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "student")
    teacher = None
    if spec.chat_template == TEACHER:
        teacher = saved.setting(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "teacher").tokenizer()
    export_model(saved.load_student(spec), spec, spec.tokenizer(teacher, pads=False), target)
    return target

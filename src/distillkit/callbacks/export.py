"""Export of the trained student as a transformers folder."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from lightning import Callback, Trainer
from rich import get_console

from distillkit.callbacks.model_card import model_card, trained_run
from distillkit.callbacks.plots import draw
from distillkit.data.chat_templates import TEACHER
from distillkit.errors import ConfigError
from distillkit.evaluation.examples import examples
from distillkit.models.export import check_adapter_only, check_export, export_model, stored_dtype
from distillkit.models.finite import require_finite
from distillkit.models.loading import DTYPES
from distillkit.models.scoring import base_model
from distillkit.run_folder import CURVES, EXPORT, read_metrics
from distillkit.types import Tokenizer

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule

_log = logging.getLogger(__name__)


class Export(Callback):
    """Writes `export`, a folder that `AutoModelForCausalLM.from_pretrained` loads, and `curves.png` when training ends.

    The folder holds safetensors (a LoRA adapter merged), tokenizer, chat template, generation config and a model card
    with the method, the data and the held-out metrics. It appears only once the model was read back from it and has the
    logits of the trained one. Whatever can be known at the start is checked there. A run with `fast_dev_run` exports
    nothing.

    Args:
        folder: Target folder; None is `export` in the run's folder.
        dtype: Type of the stored weights; None is the type in which the student's source stores its weights, so that
            the export has the source's size.
        adapter_only: Whether the LoRA adapter alone is written, as peft loads it onto the student's source.

    Raises:
        ConfigError: If `dtype` is unknown, or set for an adapter, which keeps the type that it was trained in.
    """

    def __init__(
        self,
        folder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        adapter_only: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"Export.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if adapter_only and dtype is not None:
            raise ConfigError("Export.dtype is that of a merged model: leave it out, or set adapter_only to false.")
        self.folder, self.dtype, self.adapter_only = folder, dtype, adapter_only

    def setup(self, trainer: Trainer, pl_module: "RunModule", stage: str) -> None:
        """Checks the settings against those of the student, before any model is loaded.

        Raises:
            ConfigError: If an adapter is to be exported and there is none, or none that fits its source.
        """
        if stage == "fit" and self.adapter_only:
            check_adapter_only(pl_module.student_spec, "Export.adapter_only")

    def on_fit_start(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Saves all but the weights on every rank, to find out now whether that can be done.

        Raises:
            ConfigError: If the folder can't be written.
            ModelError: If the generation config has a fault.
        """
        student = pl_module.student_spec
        removed = check_export(pl_module.student, student, self._tokenizer(pl_module), self._target(trainer))
        if removed:
            names = ", ".join(removed)
            _log.info("The generation config of %s sets %s without effect; the export does not.", student.source, names)

    def on_fit_end(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Exports the student on the first rank.

        Raises:
            ModelError: If a weight is NaN or infinite, or the model that would be reloaded differs from the trained
                one; an earlier export is left as it was.
        """
        if not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it through a connector
            _log.info("trainer.fast_dev_run: the student is not exported.")
            return
        require_finite(pl_module.student, "the student")
        root, folder, student = Path(trainer.default_root_dir), self._target(trainer), pl_module.student_spec
        dtype = stored_dtype(student.source, student.options) if self.dtype is None else DTYPES[self.dtype]
        tokenizer = self._tokenizer(pl_module)
        card = {"README.md": model_card(trained_run(pl_module, trainer), folder.name, tokenizer, self.adapter_only)}
        divergence = export_model(pl_module.student, student, tokenizer, folder, dtype, self.adapter_only, card)
        trained_dtype = base_model(pl_module.student).dtype
        if not self.adapter_only and torch.finfo(dtype).eps > torch.finfo(trained_dtype).eps:
            names = [str(name).removeprefix("torch.") for name in (dtype, trained_dtype)]
            reason = f"the type of {student.source}" if self.dtype is None else "Export.dtype"
            _log.info(
                "The export is in %s (%s), rounded from %s: KL %.2g nats per token. Export.dtype chooses another type.",
                names[0],
                reason,
                names[1],
                divergence,
            )
        _log.info("%s", summary(pl_module.history))
        series = read_metrics(root)
        if not series:  # of another logger, or of none
            _log.info("The student is in %s. No curves are drawn: the run's folder has no CSV log.", folder)
            return
        title = f"{type(pl_module.loss).__name__}: {root.name}"
        draw(series, root / CURVES, title, pl_module.schedules, examples(root, 3))
        _log.info("The student is in %s, its curves in %s.", folder, root / CURVES)
        if not self.adapter_only:
            get_console().print(next_steps(root, folder), soft_wrap=True, markup=False, highlight=False)

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.folder).expanduser() if self.folder else Path(trainer.default_root_dir) / EXPORT

    def _tokenizer(self, pl_module: "RunModule") -> Tokenizer:
        """The student's tokenizer as it is read from its source, with the run's template but without a fixed date."""
        student, teacher = pl_module.student_spec, pl_module.same_vocab_teacher
        needs_teacher = teacher is not None and student.chat_template == TEACHER
        return student.tokenizer(teacher.tokenizer() if needs_teacher and teacher is not None else None, pads=False)


def next_steps(root: Path, folder: Path) -> str:
    """Commands that a user may want after a run, one per line.

    Args:
        root: The run's folder.
        folder: The exported student.
    """
    commands = {
        f"distillkit chat {shlex.quote(str(folder))}": "talk to the student, beside its teacher",
        f"distillkit evaluate --run {shlex.quote(str(root))}": "measure it on the held-out prompts",
        f"vllm serve {shlex.quote(str(folder))}": "serve it",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"  {command:<{width}}  {purpose}" for command, purpose in commands.items())])


def summary(history: list[dict[str, float]]) -> str:
    """The first and the last held-out metrics in one line."""
    if not history:
        return "No held-out metrics: no validation was run."
    first, last = history[0], history[-1]
    names = [name for name in last if name != "step"]
    changes = [f"{name.removeprefix('val/')} {first[name]:.3f} -> {last[name]:.3f}" for name in names if name in first]
    return f"Held-out, step {first['step']:.0f} -> {last['step']:.0f}: " + ", ".join(changes)

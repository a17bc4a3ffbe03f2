"""The trained student as a transformers folder."""

import logging
from pathlib import Path
from typing import Any

from lightning import Callback

from distillkit.callbacks.card import model_card
from distillkit.callbacks.curves import draw, read_metrics
from distillkit.models.checkpoint import quiet
from distillkit.models.loading import merge_lora
from distillkit.models.scoring import base_model

_log = logging.getLogger(__name__)


class Export(Callback):
    """Writes `export`, a folder that `AutoModelForCausalLM.from_pretrained` loads, and `curves.png` when training ends.

    The folder holds safetensors (a LoRA adapter merged), tokenizer, chat template, generation config and a model card
    with the method, the data and the measured figures.

    Args:
        folder: Where to; None is `export` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """On the first rank."""
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        folder = Path(self.folder) if self.folder else root / "export"
        folder.mkdir(parents=True, exist_ok=True)
        model = base_model(merge_lora(pl_module.student))
        with quiet():
            model.save_pretrained(folder)
            pl_module.tokenizer.save_pretrained(folder)
        card = model_card(pl_module, trainer)
        (folder / "README.md").write_text(card)
        name = f"{type(pl_module.loss).__name__}: {root.name}"
        draw(read_metrics(root), root / "curves.png", name)
        _log.info("%s", summary(pl_module.history))
        _log.info("The student is in %s, its curves in %s.", folder, root / "curves.png")


def summary(history: list[dict[str, float]]) -> str:
    """First and last held-out figures, one after the other."""
    if not history:
        return "No held-out figures: the run had no validation prompts."
    first, last = history[0], history[-1]
    names = [name for name in last if name != "step"]
    figures = [f"{name.removeprefix('val/')} {first[name]:.3f} -> {last[name]:.3f}" for name in names if name in first]
    return f"Held-out, step {first['step']:.0f} -> {last['step']:.0f}: " + ", ".join(figures)

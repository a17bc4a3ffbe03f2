"""The state of a run in its checkpoints, besides the weights and what Lightning saves."""

from typing import Any

from distillkit.errors import ConfigError
from distillkit.training import resume
from distillkit.training.identity import resumed_place
from distillkit.training.optimizer_state import apply_settings
from distillkit.training.place import current_place, restart_at
from distillkit.training.run_module import RunModule

_STUDENT = "student."


def save_run(module: RunModule, checkpoint: dict[str, Any]) -> None:
    """Adds the state of a run to a checkpoint, and removes the weights that never change. Every rank must call this.

    Args:
        module: The module.
        checkpoint: The checkpoint, changed in place.
    """
    checkpoint["state_dict"] = resume.without_frozen(checkpoint["state_dict"], module.student, _STUDENT)
    history, step = module.history, module.trainer.global_step
    position = current_place(module.trainer, validated=bool(history) and history[-1]["step"] == step)
    random = resume.gather_states(module.step_random.at(position.total_batches, module.device))
    datamodule = module.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it through a connector
    counts = {split: len(prompts) for split, prompts in getattr(datamodule, "prompts", {}).items()}
    state = {"history": history, "random": random, "place": vars(position), "num_prompts": counts}
    checkpoint["distillkit"] = module.rounds.state_dict() | module.identity | state


def load_run(module: RunModule, checkpoint: dict[str, Any]) -> None:
    """Restores the state of a run; to train on, compares the run with that of the checkpoint.

    Args:
        module: The module, whose student is loaded.
        checkpoint: The checkpoint. Lightning restores its own state afterwards, which is changed in place.

    Raises:
        ModelError: If the student is another one.
        ConfigError: If training can't go on with the settings of the run.
    """
    resume.require_trained(checkpoint["state_dict"], module.student, _STUDENT)
    module.strict_loading = all(parameter.requires_grad for parameter in module.student.parameters())
    saved = module.resumed = checkpoint["distillkit"]
    module.rounds.load_state_dict(saved)
    module.validation.resume(saved["history"], checkpoint["global_step"])
    restarted = resume.adopt_parts(checkpoint["state_dict"], module.state_dict(), _STUDENT)
    if module.trainer.state.fn != "fit":
        return
    if "optimizer_states" not in checkpoint:
        raise ConfigError(
            "The checkpoint was saved with save_weights_only: it has no state of the optimizer, and only measures or "
            "exports. Name another one, or begin a new run with its student: model.student.source."
        )
    position = resumed_place(saved, module.identity, restarted, checkpoint["global_step"])
    apply_settings(saved["optimizer"], module.identity["optimizer"], checkpoint)
    restart_at(position, checkpoint["loops"]["fit_loop"])
    if saved["order"] != module.identity["order"]:
        module.rounds.forget()

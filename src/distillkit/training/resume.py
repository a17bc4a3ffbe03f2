"""Checkpoint contents: frozen weights are left out, random states are added so that a run resumes exactly."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distillkit.devices.distributed import is_initialized, world_size
from distillkit.devices.streams import backend
from distillkit.errors import ModelError


def without_frozen(state: Mapping[str, Any], model: nn.Module, prefix: str) -> dict[str, Any]:
    """A state dict without the weights that never change: those under a LoRA adapter.

    Args:
        state: State dict of a module that holds `model`.
        model: The model, whose frozen parameters have no `requires_grad`.
        prefix: Prefix of the model's keys in `state`, such as `student.`.
    """
    # Tied weights have several names, and the state dict has all of them.
    frozen = {prefix + name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def require_trained(state: Mapping[str, Any], model: nn.Module, prefix: str) -> None:
    """Checks that a state dict holds every trained weight; frozen ones come from the student's source.

    Args:
        state: State dict of a module that holds `model`.
        model: The model that is about to be loaded.
        prefix: Prefix of the model's keys in `state`, such as `student.`.

    Raises:
        ModelError: If a trained weight is missing or has another shape, or there are others.
    """
    parameters = {prefix + name: p for name, p in model.named_parameters(remove_duplicate=False)}
    trained = [name for name, p in parameters.items() if p.requires_grad]
    missing = [name for name in trained if name not in state]
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} of the {len(trained)} trained weights, such as {missing[0]}: it is "
            "from another student. Use the student and lora settings of the run that wrote it."
        )
    current = model.state_dict()
    for name, value in state.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or (key in current and current[key].shape == value.shape):
            continue
        shapes = f"with shape {tuple(value.shape)}"
        reason = (
            f"{shapes}, here {tuple(current[key].shape)}" if key in current else f"{shapes}, which the student lacks"
        )
        raise ModelError(
            f"The checkpoint has {name} {reason}: it is from another student. Use the student and lora settings of the "
            "run that wrote it."
        )


def adopt_parts(state: dict[str, Any], current: Mapping[str, Any], prefix: str) -> list[str]:
    """Has the parts that are other ones than those of the checkpoint begin with a state of their own.

    Args:
        state: State dict of the checkpoint, changed in place.
        current: State dict of the module.
        prefix: Prefix of the student's keys, which are left alone.

    Returns:
        Names of the states that the checkpoint lacks, or that no part has any more.
    """
    foreign = [name for name in state if name not in current and not name.startswith(prefix)]
    lacking = [name for name in current if name not in state and not name.startswith(prefix)]
    for name in foreign:
        del state[name]
    state.update({name: current[name] for name in lacking})
    return sorted(foreign + lacking)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random number generators in this process, by device type.

    Args:
        device: This rank's device.
    """
    state = {"cpu": torch.get_rng_state()}
    module = backend(device)
    if module is not None:
        state[device.type] = module.get_rng_state(device)
    return state


class StepRandom:
    """The random state at the start of the current optimizer step."""

    def __init__(self) -> None:
        self._total_batches, self._state = -1, dict[str, Tensor]()

    def note(self, total_batches: int, device: torch.device) -> None:
        """Notes the current state.

        Args:
            total_batches: Micro-batches of all epochs before the step.
            device: This rank's device.
        """
        self._total_batches, self._state = total_batches, random_state(device)

    def at(self, total_batches: int, device: torch.device) -> dict[str, Tensor]:
        """The state at the end of that many micro-batches: the one noted there, or the current one."""
        return self._state if total_batches == self._total_batches else random_state(device)


def gather_states(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The states of all ranks. Every rank must call this with its own."""
    if not is_initialized():
        return [state]
    states: list[dict[str, Tensor]] = [{}] * world_size()
    dist.all_gather_object(states, state)
    return states


def restore_random(states: list[dict[str, Tensor]], rank: int, device: torch.device) -> None:
    """Restores this rank's random number generators; a rank without a saved state is left as it is.

    Args:
        states: The result of `gather_states`.
        rank: Index of this process.
        device: This rank's device.
    """
    saved = states[rank] if rank < len(states) else {}
    if "cpu" in saved:
        torch.set_rng_state(saved["cpu"].cpu())
    module = backend(device)
    if module is not None and device.type in saved:
        module.set_rng_state(saved[device.type].cpu(), device)

"""What a checkpoint leaves out, and what it holds beside weights and optimizer so that a run goes on exactly."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distillkit.errors import ModelError


def without_frozen(state: Mapping[str, Any], model: nn.Module, prefix: str) -> dict[str, Any]:
    """A state dict without the weights that never change: those under a LoRA adapter.

    Args:
        state: State dict of a module that holds `model`.
        model: The model, whose frozen parameters have no `requires_grad`.
        prefix: Where `model` is in it, such as `student.`.
    """
    # Tied weights have several names, and the state dict has all of them.
    frozen = {prefix + name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def require_trained(state: Mapping[str, Any], model: nn.Module, prefix: str) -> None:
    """Checks that a state dict holds all that is trained: the frozen rest comes from the student's source.

    Args:
        state: State dict of a module that holds `model`.
        model: The model that is about to be loaded.
        prefix: Where `model` is in it, such as `student.`.

    Raises:
        ModelError: If a trained weight is missing.
    """
    trained = [prefix + name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    missing = [name for name in trained if name not in state]
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} of the {len(trained)} trained weights, such as {missing[0]}: it is "
            "of another student. Use the student and lora settings of the run that wrote it."
        )


def random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """The state of torch's random numbers on each rank: every rank must call this.

    Args:
        device: This rank's device.
    """
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def restore_random(states: list[dict[str, Tensor]], rank: int, device: torch.device) -> None:
    """Puts this rank's random numbers where they were; a rank that did not exist then keeps its own.

    Args:
        states: What `random_states` gave.
        rank: Number of this process.
        device: This rank's device.
    """
    own = states[rank] if rank < len(states) else {}
    if "cpu" in own:
        torch.set_rng_state(own["cpu"].cpu())
    if "cuda" in own and device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"].cpu(), device)

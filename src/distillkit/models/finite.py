"""Check that a model's weights are numbers."""

import torch
from torch import nn

from distillkit.errors import ModelError


def require_finite(model: nn.Module, name: str) -> None:
    """Checks that no weight is NaN or infinite.

    Args:
        model: The model, on any device.
        name: Name of the model in the message.

    Raises:
        ModelError: If a weight is not finite.
    """
    broken = tensors_not_finite(model)
    if broken:
        raise ModelError(
            f"{len(broken)} tensors of {name} hold NaN or infinity, such as {broken[0]}, and nothing was written. "
            "Resume from an earlier checkpoint with a lower learning rate, and add FiniteLoss to "
            "trainer.callbacks, which stops at the first such step."
        )


@torch.no_grad()
def tensors_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters and saved buffers that have an entry that is NaN or infinite."""
    # The extremes are NaN if any entry is; they take one pass and no memory.
    floating = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in floating.items() if tensor.numel()}
    return [name for name, ends in extremes.items() if not bool(ends.isfinite().all())]

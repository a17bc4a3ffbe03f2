"""A short name for exactly these weights."""

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """The first 16 hex digits of a sha256 over the model's state dict: names, shapes, types and bytes, by name.

    Two models agree if they would save the same tensors. Tied weights count once. One tensor at a time is on the host.

    Args:
        model: On any device. Not sharded: the shards of one rank are not the model.

    Returns:
        16 hex digits, the same in every process and on every device.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:  # with keep_vars tied weights are one object
            seen.add(id(tensor))
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    # As bytes, because numpy has no bfloat16; on the CPU this is a view.
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

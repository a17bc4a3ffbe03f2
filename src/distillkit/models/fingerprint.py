"""Fingerprints of model weights: a short hash that identifies them exactly."""

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """The first 16 hex digits of a sha256 over the model's state dict: names, shapes, types and bytes, by name.

    Two models have the same fingerprint if they would save the same tensors. Tied weights count once. Only one tensor
    at a time is copied to the host.

    Args:
        model: The model, on any device. It must not be sharded: one rank's shards are not the whole model.

    Returns:
        16 hex digits, the same in every process and on every device.
    """
    digest = hashlib.sha256()
    hashed: set[int] = set()  # ids of tensors
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in hashed:  # with keep_vars tied weights are one object
            hashed.add(id(tensor))
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    # As bytes, because numpy has no bfloat16; on the CPU this is a view.
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

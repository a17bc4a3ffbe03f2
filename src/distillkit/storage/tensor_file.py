"""A safetensors file with settings and a checksum over all of it, in its own metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillkit.errors import StoreError
from distillkit.storage.atomic import write_atomically
from distillkit.storage.checksum import checksum


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Writes tensors on the CPU and JSON values, atomically."""
    metadata = {**settings, "checksum": _checksum(tensors, settings)}
    write_atomically(path, save(dict(tensors), {"distillkit": json.dumps(metadata)}))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the settings in a file.

    Args:
        path: The file.
        kind: Word for its folder in error messages, such as `teacher cache`.

    Raises:
        StoreError: If the file can't be read, or differs from its checksum.
    """
    try:
        with _open(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        settings = json.loads(metadata.get("distillkit", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"{path} can't be read ({reason}): restore it or remove the {kind}.") from error
    if not isinstance(settings, dict) or settings.pop("checksum", None) != _checksum(tensors, settings):
        raise StoreError(f"{path} is damaged (its checksum differs): restore it or remove the {kind}.")
    return tensors, settings


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _checksum(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Checksum of the settings, and of the names, types, shapes and bytes of the tensors."""
    parts: list[bytes | memoryview] = [json.dumps(settings, sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()]
        parts += [tensor.contiguous().view(torch.uint8).numpy().data]
    return checksum(*parts)

"""What is known of a teacher without its model, on disk: which weights they are, how many logits, the head."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from distillkit.errors import StoreError
from distillkit.heads import OutputHead
from distillkit.manifest import read_manifest, write_atomically
from distillkit.teachers.kept import rebuilt_head

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Card:
    """Which teacher a folder is about.

    Args:
        identity: What named its weights when they were last loaded; None if that could not be told.
        fingerprint: A short name for exactly these weights; None of a teacher without a model.
        width: Number of its logits.
    """

    identity: str | None
    fingerprint: str | None
    width: int


def read_card(folder: Path) -> Card | None:
    """The folder's card, if it has one.

    Raises:
        StoreError: If it is damaged or of another version.
    """
    found = read_manifest(folder / "teacher.json", SCHEMA_VERSION, "teacher cache")
    return Card(found["identity"], found["fingerprint"], found["width"]) if found else None


def write_card(folder: Path, card: Card) -> None:
    """Writes the folder's card, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA_VERSION, **asdict(card)}, indent=1)
    write_atomically(folder / "teacher.json", text.encode())


def read_head(folder: Path, card: Card, device: torch.device) -> OutputHead | None:
    """The teacher's head on `device`, if it was kept.

    Raises:
        StoreError: If its file is damaged, or of other weights than the card says.
    """
    path = folder / "head.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, SafetensorError) as error:
        said = str(error).splitlines()[0]
        raise StoreError(f"{path} can't be read ({said}): restore it or remove the teacher cache.") from error
    known = json.loads(metadata["distillkit"])
    if known["fingerprint"] != card.fingerprint:
        raise StoreError(f"{path} is not of the teacher that {folder} is about: remove the teacher cache.")
    return rebuilt_head(tensors["weight"], tensors.get("bias"), known["scale"], known["softcap"])


def write_head(folder: Path, card: Card, head: OutputHead) -> None:
    """Keeps the teacher's head, atomically."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.module.named_parameters()}
    known = {"fingerprint": card.fingerprint, "scale": head.scale, "softcap": head.softcap}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "head.safetensors", save(tensors, {"distillkit": json.dumps(known)}))

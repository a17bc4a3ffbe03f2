"""Teacher metadata on disk, readable without loading the model: which weights, how many logits, the output head."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distillkit.chunked.output_head import OutputHead
from distillkit.errors import StoreError
from distillkit.storage.atomic import write_atomically
from distillkit.storage.manifest import Entry, encode_manifest, read_manifest
from distillkit.storage.score_shards import KIND, SCHEMA_VERSION
from distillkit.storage.tensor_file import read_tensors, write_tensors
from distillkit.teachers.score_format import rebuilt_head


@dataclass(frozen=True)
class TeacherMetadata:
    """The teacher whose scores a folder caches.

    Args:
        identity: Name of its weights when they were last loaded (`Teacher.identity`); None if they have none.
        fingerprint: Hash that identifies exactly these weights; None for a teacher without a model.
        width: Number of logits.
    """

    identity: str | None
    fingerprint: str | None
    width: int


def read_metadata(folder: Path) -> TeacherMetadata | None:
    """The folder's metadata; None if it has none.

    Raises:
        StoreError: If the file is damaged or of another schema version.
    """
    path = folder / "teacher.json"
    manifest = read_manifest(path, SCHEMA_VERSION, KIND)
    if not manifest:
        return None
    entry = Entry(manifest, str(path))
    identity, fingerprint = (
        None if manifest.get(name) is None else entry.text(name) for name in ("identity", "fingerprint")
    )
    return TeacherMetadata(identity, fingerprint, entry.count("width", 1))


def write_metadata(folder: Path, metadata: TeacherMetadata) -> None:
    """Writes the folder's metadata, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "teacher.json", encode_manifest({"schema": SCHEMA_VERSION, **asdict(metadata)}))


def read_head(folder: Path, metadata: TeacherMetadata, device: torch.device) -> OutputHead | None:
    """The teacher's cached output head on `device`; None if the folder has none.

    Raises:
        StoreError: If the file is damaged, or of other weights than `metadata` names.
    """
    path = folder / "head.safetensors"
    if not path.is_file():
        return None
    tensors, settings = read_tensors(path, KIND)
    if settings["fingerprint"] != metadata.fingerprint:
        raise StoreError(f"{path} is not of the teacher whose scores {folder} caches: remove the teacher cache.")
    bias = tensors["bias"].to(device) if "bias" in tensors else None
    return rebuilt_head(tensors["weight"].to(device), bias, settings["scale"], settings["softcap"])


def write_head(folder: Path, metadata: TeacherMetadata, head: OutputHead) -> None:
    """Writes the teacher's output head, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.module.named_parameters()}
    settings = {"fingerprint": metadata.fingerprint, "scale": head.scale, "softcap": head.softcap}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "head.safetensors", tensors, settings)

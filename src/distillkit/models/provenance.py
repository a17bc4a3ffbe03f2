"""Provenance of a model: its public name, its base model on the hub, and its licence, where the model names them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from distillkit.models.conversion import adapter_base
from distillkit.models.options import DEFAULT, SourceOptions
from distillkit.models.sources import is_adapter
from distillkit.remote.wheels import cached_wheel_file, is_wheel

_CARD = "README.md"
_HUB_SECONDS = 5.0
"""Time within which the hub must answer; a card is worth no wait."""


@dataclass(frozen=True)
class Provenance:
    """Origin of a model, for the card of one that was made from it.

    Args:
        base_model: Hub id of the model, or of the one that it was made from; None if it names none.
        licence: Identifier of its licence as hubs use it, such as `apache-2.0`; None if it names none.
    """

    base_model: str | None = None
    licence: str | None = None


def provenance(source: str, options: SourceOptions = DEFAULT) -> Provenance:
    """The origin of a model by its card, or by the metadata of its GGUF file; the model is not loaded.

    Args:
        source: A model source. Of a hub id the card is read from the cache, or from the hub if it answers soon.
        options: Revision of a hub id.
    """
    path = Path(source).expanduser()
    if is_wheel(source):
        file = cached_wheel_file(source)
        return Provenance() if file is None else _of_gguf(file)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if is_adapter(path):
        return provenance(adapter_base(path))
    if path.is_dir():
        return _of_card(path / _CARD, None)
    return _of_card(_hub_card(source, options), source)


def public_name(source: str) -> str:
    """A source as others may read it: of a local path, its last component alone.

    Args:
        source: A model source, a file or any other text.
    """
    path = Path(source).expanduser()
    is_local = path.is_absolute() or source.startswith((".", "~")) or (not is_wheel(source) and path.exists())
    return path.name or source if is_local else source


def _of_card(card: Path | None, hub_id: str | None) -> Provenance:
    from huggingface_hub.repocard import metadata_load

    try:
        metadata: dict[str, Any] = (metadata_load(card) if card is not None and card.is_file() else None) or {}
    except (OSError, ValueError, YAMLError):  # a card that can't be read names nothing
        metadata = {}
    base, licence = hub_id or metadata.get("base_model"), metadata.get("license")
    return Provenance(base if isinstance(base, str) else None, licence if isinstance(licence, str) else None)


def _hub_card(source: str, options: SourceOptions) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source, _CARD, revision=options.revision, etag_timeout=_HUB_SECONDS))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def _of_gguf(file: Path) -> Provenance:
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    values = {name: field.contents() for name, field in fields.items() if name.startswith("general.")}
    url = str(values.get("general.base_model.0.repo_url", ""))
    base = url.removeprefix("https://huggingface.co/") if url.startswith("https://huggingface.co/") else None
    licence = values.get("general.license")
    return Provenance(base, licence if isinstance(licence, str) else None)

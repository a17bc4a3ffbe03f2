"""Locations of rows: files, wheels, folders and hub datasets, by the path that names them.

Every error names the path as the user wrote it.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distillkit.data.files import READERS, Rows, reader_of
from distillkit.errors import ConfigError, DataError
from distillkit.remote.wheels import check_wheel_form, is_wheel, wheel_file

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_LIKE = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|arrow|gz|zst|xz|bz2|zip)$", re.IGNORECASE)
_WILDCARDS = re.compile(r"[*?[]")

Kind = Literal["file", "wheel", "pattern", "folder", "hub"]


@dataclass(frozen=True)
class Choice:
    """Choices within a dataset; files have none.

    Args:
        split: Name of the split.
        hub_config: Configuration of a hub dataset; None is its default.
        revision: Branch, tag or commit of a hub dataset; None is its main branch.
    """

    split: str = "train"
    hub_config: str | None = None
    revision: str | None = None


def kind_of(path: str) -> Kind:
    """The kind of location that a path names. What exists on this machine comes before the hub."""
    local = Path(path).expanduser()
    if is_wheel(path):
        return "wheel"
    if local.is_dir():
        return "folder"
    if _WILDCARDS.search(path) and not local.is_file():
        return "pattern"
    file_like = FILE_LIKE.search(path) or path.startswith(("/", ".", "~")) or local.is_file()
    return "file" if file_like or not HUB_ID.fullmatch(path) else "hub"


def name_of(path: str) -> str:
    """The path as messages show it: that of a file in a wheel without its hash."""
    return path.removeprefix("wheel:").partition("#")[0] if is_wheel(path) else path


def check_choice(path: str, choice: Choice) -> None:
    """Refuses choices that a location doesn't have.

    Raises:
        ConfigError: If a file has a split or a hub configuration, or anything but a hub dataset a revision.
    """
    kind = kind_of(path)
    if kind not in ("hub", "folder") and (choice.split != "train" or choice.hub_config is not None):
        raise ConfigError(
            f"Source.split and Source.hub_config choose within a hub dataset, but {path} is a file: leave them out."
        )
    if kind != "hub" and choice.revision is not None:
        raise ConfigError(f"Source.revision chooses within the hub, but {path} is no hub dataset: leave it out.")


def check_path(path: str) -> None:
    """Checks a location without reading or downloading anything.

    Raises:
        ConfigError: If a wheel is not named in the required form.
        DataError: If a file is missing or has an unknown format, or a pattern matches no file.
    """
    kind = kind_of(path)
    if kind == "wheel":
        check_wheel_form(path)
    elif kind == "file" and not Path(path).expanduser().is_file():
        raise DataError(
            f"Source.path: there is no file {path}; correct the path, which starts at {Path.cwd()} unless it is "
            "absolute."
        )
    names = [name_of(path)] if kind in ("wheel", "file") else [str(file) for file in _matches(path, kind)]
    if kind == "pattern" and not names:
        raise DataError(f"Source.path: no file matches {path}; correct it, it starts at {Path.cwd()} unless absolute.")
    for name in names:
        if reader_of(name) is None:
            raise DataError(f"Source.path: {name} has an unknown format; convert it to one of {', '.join(READERS)}.")


def local_files(path: str) -> list[Path] | None:
    """The files that a path names, in the order in which they are read; None for a folder or a hub dataset.

    Raises:
        DistillKitError: If a wheel can't be fetched.
    """
    kind = kind_of(path)
    if kind in ("folder", "hub"):
        return None
    if kind == "wheel":
        return [wheel_file(path)]
    return [Path(path).expanduser()] if kind == "file" else _matches(path, kind)


def rows_of(path: str, choice: Choice) -> Iterator[tuple[str, object]]:
    """Yields the location of each row, such as `train.jsonl line 7`, and its content.

    Args:
        path: A checked path.
        choice: Choices within a dataset.

    Raises:
        DataError: If a file is malformed, or a dataset can't be loaded.
    """
    files = local_files(path)
    if files is None:
        rows = _saved_rows(path, choice) if _is_saved(path) else _dataset_rows(path, choice)
        yield from ((f"{path} {location}", row) for location, row in rows)
    for file in files or ():
        name = str(file) if kind_of(path) == "pattern" else name_of(path)
        reader = reader_of(name)
        assert reader is not None, "checked"
        yield from ((f"{name} {location}", row) for location, row in reader(file, name))


def _matches(path: str, kind: Kind) -> list[Path]:
    """The files that match a pattern, sorted by name."""
    if kind != "pattern":
        return []
    names = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
    return [Path(name) for name in names if Path(name).is_file()]


def _is_saved(path: str) -> bool:
    """True for a folder that `save_to_disk` of the datasets library wrote."""
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_rows(path: str, choice: Choice) -> Rows:
    import datasets  # takes seconds to import, and files don't need it

    try:
        loaded = datasets.load_from_disk(str(Path(path).expanduser()))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"Source.path: the folder {path} is no readable dataset ({reason}); save it again.") from error
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if choice.hub_config is not None or choice.split not in splits:
        raise DataError(
            f"Source.split: the saved dataset {path} has {', '.join(splits)}, not {choice.split!r}, and no "
            "configurations; set split to one of these, and leave hub_config out."
        )
    yield from _numbered(choice.split, splits[choice.split])


def _dataset_rows(path: str, choice: Choice) -> Rows:
    import datasets  # takes seconds to import, and files don't need it

    is_folder = kind_of(path) == "folder"
    revision = {} if choice.revision is None else {"revision": choice.revision}
    name = str(Path(path).expanduser().absolute()) if is_folder else path
    try:
        rows = datasets.load_dataset(name, choice.hub_config, split=choice.split, **revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"Source.path: the {'folder' if is_folder else 'hub dataset'} {path} can't be loaded with split "
            f"{choice.split!r} and hub_config {choice.hub_config!r}; correct them"
            f"{'' if is_folder else ' or the connection'} ({reason})."
        ) from error
    yield from _numbered(choice.split, rows)


def _numbered(split: str, rows: Iterator[object]) -> Rows:
    yield from ((f"{split} row {row_number}", row) for row_number, row in enumerate(rows, start=1))

"""Locations of rows: files, wheels, folders and hub datasets, by the path that names them.

Every error names the path as the user wrote it.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from distillkit.data.files import READERS, Rows, reader_of
from distillkit.errors import ConfigError, DataError
from distillkit.remote.wheels import check_wheel_form, is_wheel, wheel_file

_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|jsonlines|parquet|csv|tsv|arrow)(\.(gz|zst|xz|bz2))?$", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_LIKE = re.compile(r"\.(jsonl?|ndjson|jsonlines|parquet|csv|tsv|txt|arrow|gz|zst|xz|bz2|zip)$", re.IGNORECASE)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\..*")
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
    if files is None and kind_of(path) == "folder" and not _is_saved(path):
        yield from _folder_rows(path, choice)
    elif files is None:
        rows = _saved_rows(path, choice) if _is_saved(path) else _dataset_rows(path, choice)
        yield from ((f"{path} {location}", row) for location, row in rows)
    for file in files or ():
        name = str(file) if kind_of(path) == "pattern" else name_of(path)
        reader = reader_of(name)
        assert reader is not None, "checked"
        yield from ((f"{name} {location}", row) for location, row in reader(file, name))


def _matches(path: str, kind: Kind) -> list[Path]:
    """The files that match a pattern, sorted by name.

    Raises:
        DataError: If a match is a link to a file that is not there.
    """
    if kind != "pattern":
        return []
    names = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
    _refuse_broken_links(names)
    return [Path(name) for name in names if Path(name).is_file()]


def _refuse_broken_links(names: Iterable[str]) -> None:
    """Refuses files that are links to nothing, which would be left out."""
    if broken := next((name for name in names if not Path(name).exists()), None):
        raise DataError(f"Source.path: {broken} is a link to a file that is not there; restore the file or the link.")


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
    # A saved format shows some columns only, or arrays instead of lists.
    yield from _numbered(choice.split, splits[choice.split].with_format(None))


def _folder_rows(path: str, choice: Choice) -> Iterator[tuple[str, object]]:
    """The rows of a folder of data files, each file read as one that is named itself.

    The datasets library says which files are which split, and reads those of the formats that are not read here.
    """
    import datasets  # takes seconds to import, and files don't need it

    folder = Path(path).expanduser().resolve()
    try:
        config = datasets.load_dataset_builder(str(folder), choice.hub_config).config
        instruction = datasets.ReadInstruction.from_spec(choice.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_loaded(path, choice, error) from error
    files = {str(split): [Path(file) for file in files] for split, files in config.data_files.items()}
    _refuse_unused(path, folder, files)
    _refuse_missing_shards(path, files)
    if not all(reader_of(file.name) for group in files.values() for file in group):
        yield from ((f"{path} {location}", row) for location, row in _dataset_rows(path, choice))
    elif choice.split in files:
        yield from _rows_of_files(path, folder, files[choice.split])
    else:
        rows = {split: list(_rows_of_files(path, folder, group)) for split, group in files.items()}
        try:
            parts = instruction.to_absolute({split: len(group) for split, group in rows.items()})
        except ValueError as error:
            raise _not_loaded(path, choice, error) from error
        for part in parts:
            yield from rows[part.splitname][part.from_ : part.to]


def _rows_of_files(path: str, folder: Path, files: list[Path]) -> Iterator[tuple[str, object]]:
    """The rows of some files of a folder, named by the path as the user wrote it."""
    for file in files:
        name = os.path.join(path, file.relative_to(folder))
        reader = reader_of(name)
        assert reader is not None, "checked"
        yield from ((f"{name} {location}", row) for location, row in reader(file, name))


def _refuse_unused(path: str, folder: Path, files: Mapping[str, list[Path]]) -> None:
    """Refuses data files of a folder that belong to none of its splits, unless its card chooses files."""
    from datasets.data_files import FILES_TO_IGNORE

    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return
    used = {file.resolve() for group in files.values() for file in group}
    names = [  # without hidden ones, and with those of linked folders
        name
        for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True))
        if _DATA_FILE.search(name) and Path(name).name not in FILES_TO_IGNORE and not name.startswith("__")
    ]
    _refuse_broken_links(str(folder / name) for name in names)
    unused = [name for name in names if (folder / name).is_file() and (folder / name).resolve() not in used]
    if unused:
        raise DataError(
            f"Source.path: the folder {path} has files that belong to no split: {', '.join(unused)[:500]}; its splits "
            f"are {', '.join(files)}. Name the files after a split, use one format, or name them with a pattern such "
            "as folder/*.jsonl."
        )


def _refuse_missing_shards(path: str, files: Mapping[str, list[Path]]) -> None:
    """Refuses a folder without all of the files that their names count, such as `train-00001-of-00002.parquet`."""
    shards: dict[tuple[str, int], set[int]] = {}
    for file in chain.from_iterable(files.values()):
        if match := _SHARD.fullmatch(str(file)):
            shards.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, total), numbers in shards.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            raise DataError(
                f"Source.path: the folder {path} has {len(numbers)} of the {total} files of {Path(name).name}: number "
                f"{missing[0]:05} is missing. Copy the folder again, or name the files that you want with a pattern."
            )


def _not_loaded(path: str, choice: Choice, error: Exception) -> DataError:
    """The error for a folder or a hub dataset that can't be loaded."""
    is_folder = kind_of(path) == "folder"
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())
    return DataError(
        f"Source.path: the {'folder' if is_folder else 'hub dataset'} {path} can't be loaded with split "
        f"{choice.split!r} and hub_config {choice.hub_config!r}; correct them"
        f"{'' if is_folder else ' or the connection'} ({reason})."
    )


def _dataset_rows(path: str, choice: Choice) -> Rows:
    import datasets  # takes seconds to import, and files don't need it

    is_folder = kind_of(path) == "folder"
    revision = {} if choice.revision is None else {"revision": choice.revision}
    name = str(Path(path).expanduser().absolute()) if is_folder else path
    try:
        rows = datasets.load_dataset(name, choice.hub_config, split=choice.split, **revision)
        if getattr(rows, "builder_name", None) == "csv":  # by default it reads the texts NA, None and null as nothing
            texts = {"keep_default_na": False} | revision
            rows = datasets.load_dataset(name, choice.hub_config, split=choice.split, **texts)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_loaded(path, choice, error) from error
    yield from _numbered(choice.split, rows)


def _numbered(split: str, rows: Iterator[object]) -> Rows:
    yield from ((f"{split} row {row_number}", row) for row_number, row in enumerate(rows, start=1))

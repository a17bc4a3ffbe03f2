"""Plugin packages made by a test in a temporary folder and installed by pip."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"

[tool.setuptools]
{modules}

[project.entry-points."distillkit.losses"]
"""


def write_package(
    folder: Path,
    release: str,
    losses: Sequence[str],
    files: Mapping[str, str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """A source tree of the distribution `release` ("name 1.0") with entry points `losses` and `files`.

    Args:
        folder: Folder of the source tree.
        release: Name and version of the distribution.
        losses: Entry points of losses, as lines of TOML.
        files: Content of each file, by path.
        groups: Entry points of other groups, by the group's name.
    """
    name, version = release.split()
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(source))
    flat = [path.removesuffix(".py") for path in files if "/" not in path]
    modules = f"py-modules = {flat}" if flat else ""
    lines = [PYPROJECT.format(name=name, version=version, modules=modules), *losses]
    for group, points in (groups or {}).items():
        lines += [f'[project.entry-points."{group}"]', *points]
    (folder / "pyproject.toml").write_text("\n".join([*lines, ""]))
    return folder


def install(folders: Sequence[Path], target: Path) -> Path:
    """Installs source trees into the folder `target`, without the network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", target, *folders], check=True)
    return target


def python_path(folder: Path) -> str:
    """PYTHONPATH of a process that finds what is installed in a folder, and what this process finds."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))

"""Plugin packages made by a test in a temporary folder and installed by pip."""

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


def write_package(folder: Path, release: str, losses: Sequence[str], files: Mapping[str, str]) -> Path:
    """A source tree of the distribution `release` ("name 1.0") with entry points `losses` and `files`."""
    name, version = release.split()
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(source))
    flat = [path.removesuffix(".py") for path in files if "/" not in path]
    modules = f"py-modules = {flat}" if flat else ""
    (folder / "pyproject.toml").write_text(
        PYPROJECT.format(name=name, version=version, modules=modules) + "\n".join([*losses, ""])
    )
    return folder


def install(folders: Sequence[Path], target: Path) -> Path:
    """Installs source trees into the folder `target`, without the network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", target, *folders], check=True)
    return target

"""The public names: what may be imported, set and logged stays as tests/frozen says, and nothing else is relied on.

`DISTILLKIT_WRITE_NAMES=1 pytest tests/test_public_names.py` writes the files and the table in docs/plugins.md anew.
CHANGELOG.md says what has changed for users.
"""

import difflib
import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from distillkit import registry
from helpers import docs, logs, settings, signatures
from helpers.answers import shorten
from helpers.docs import ROOT
from helpers.public import faces, objects, private_names, private_paths

FROZEN = Path(__file__).parent / "frozen"
WRITE = "DISTILLKIT_WRITE_NAMES"
HINT = f"If this is meant, run this test with {WRITE}=1, which writes it anew, and tell users in CHANGELOG.md."
TEMPLATES = ROOT / "src" / "distillkit" / "cli" / "templates"
AREAS = (ROOT / "plugins", ROOT / "benchmarks", TEMPLATES)
INTERNAL = {"bit_flips.py", "compare_report.py", "full_disk.py", "kills.py"}
"""Benchmarks of files and functions that nobody else uses: kills, full disks, damage to files, the cost of a report."""
SOURCES = sorted(
    path
    for area in AREAS
    for path in area.rglob("*.py")
    if path.name not in INTERNAL and path.parent.name != "kill_parts"
)
CONFIGS = sorted(path for area in (*AREAS, ROOT / "configs") for path in area.rglob("*.yaml"))


def difference(frozen: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The lines that only one of the two has, with - or + before them."""
    changes = list(difflib.unified_diff(frozen, lines, n=0, lineterm=""))
    return [line for line in changes[2:] if not line.startswith("@@")]


def check(name: str, lines: Sequence[str]) -> None:
    """Refuses lines that are not those of the frozen file `name`, or writes the file."""
    path = FROZEN / name
    if os.environ.get(WRITE) == "1":
        path.write_text("".join(f"{line}\n" for line in lines))
    changes = difference(path.read_text().splitlines(), lines)
    assert not changes, "\n".join([f"{path} and the code differ. {HINT}", *changes])


# ── frozen lists ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_public_names_and_signatures_are_frozen():
    public = objects()
    classes = {value for value in public.values() if isinstance(value, type)}
    lines = [line for path, value in public.items() for line in signatures.describe(path, value, classes)]
    check("public_names.txt", lines)


def test_settings_and_defaults_are_frozen():
    check("config_keys.txt", settings.setting_lines())


def test_names_of_logged_metrics_are_frozen(tmp_path, monkeypatch):
    shorten(monkeypatch, num_tokens=2)
    check("log_names.txt", logs.metric_lines(tmp_path))


@pytest.mark.parametrize(
    ("lines", "changes"),
    [
        (["Part.a: int = 1", "Part.b: int"], []),
        (["Part.a: int = 1"], ["-Part.b: int"]),
        (["Part.a: int = 2", "Part.b: int"], ["-Part.a: int = 1", "+Part.a: int = 2"]),
        (["Part.a: int = 1", "Part.b: int", "Part.c: int"], ["+Part.c: int"]),
    ],
)
def test_a_change_to_a_frozen_list_is_named(lines, changes):
    assert difference(["Part.a: int = 1", "Part.b: int"], lines) == changes


# ── faces ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_public_name_can_be_imported():
    assert len(faces()) > 20
    assert len(objects()) > 100
    for path, names in faces().items():
        module = import_module(path)
        assert set(names) <= {*dir(module), "__version__"}
        with pytest.raises(AttributeError, match="nothing"):
            module.nothing  # noqa: B018


def test_every_built_in_part_is_public_in_the_package_of_its_kind():
    built_in = [entry for entry in registry.entries() if entry.distribution == "distillkit"]
    assert len(built_in) > 30
    for entry in built_in:
        package = ".".join(entry.target.split(".")[:2])
        assert objects()[f"{package}.{entry.name}"] is registry.get(entry.kind, entry.name)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from distillkit.losses import ForwardKL\nfrom distillkit import divergences\ndivergences.kl", []),
        ("from distillkit.losses.kl import ForwardKL", ["1: distillkit.losses.kl.ForwardKL"]),
        ("from distillkit.losses import checked_share", ["1: distillkit.losses.checked_share"]),
        ("from distillkit import losses as ours\nours.checked_share(1)", ["2: distillkit.losses.checked_share"]),
        ("import distillkit.losses\ndistillkit.losses.token.side_of", ["2: distillkit.losses.token.side_of"]),
        ("import distillkit.losses.token", ["1: distillkit.losses.token"]),
        ("patch('distillkit.training.module.score')", ["1: distillkit.training.module.score"]),
        ("patch('distillkit.training.DistillModule.score')", []),
        ("import distillkit_mine.parts", []),
    ],
)
def test_a_name_that_is_not_public_is_found(source, names):
    assert private_names(source) == names


# ── users of the faces ────────────────────────────────────────────────────────────────────────────────────────────────


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_sources_and_configurations_of_every_area_are_read():
    assert all(any(path.is_relative_to(area) for path in SOURCES) for area in AREAS)
    assert len(SOURCES) > 50
    assert len(CONFIGS) > 25
    assert len(docs.all_blocks(["python"])) > 10


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_plugins_templates_and_benchmarks_use_public_names_alone(path):
    assert private_names(path.read_text()) == []


@pytest.mark.parametrize("block", docs.all_blocks(["python"]), ids=lambda block: block.location)
def test_snippets_of_the_documentation_use_public_names_alone(block):
    assert private_names(block.text) == []


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_configurations_use_public_names_alone(path):
    assert private_paths(path.read_text()) == []


@pytest.mark.parametrize("block", docs.all_blocks(["yaml"]), ids=lambda block: block.location)
def test_configurations_of_the_documentation_use_public_names_alone(block):
    assert private_paths(block.text) == []


def test_the_page_on_plugins_lists_the_public_names():
    page = ROOT / "docs" / "plugins.md"
    before, heading, rest = page.read_text().partition("## What a plugin may import\n")
    assert heading
    table = re.compile(r"(?:^\| `distillkit.*\|\n)+", re.MULTILINE)
    rows = {path: ", ".join(f"`{name}`" for name in names) for path, names in faces().items() if names}
    text = "".join(f"| `{path}` | {names} |\n" for path, names in rows.items())
    if os.environ.get(WRITE) == "1":
        page.write_text(before + heading + table.sub(text, rest, count=1))
    shown = table.search(page.read_text(), len(before))
    assert shown is not None
    assert difference(shown[0].splitlines(), text.splitlines()) == [], HINT

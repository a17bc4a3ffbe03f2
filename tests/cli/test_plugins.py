"""Real packages that break when they are imported, installed by pip into a temporary folder."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from distillkit.cli import plugins
from distillkit.errors import PluginError
from helpers.packages import install, write_package

SUMMARY = "One line that is long enough to be wider than a narrow terminal by far, " + "and then some more of it. " * 3
CLASS = f'class {{name}}:\n    """{SUMMARY.strip()}\n\n    Second.\n    """\n'


def lone_module(folder, module, version, name):
    files = {f"{module}.py": 'raise RuntimeError("imported")\n' + CLASS.format(name=name)}
    return write_package(folder, f"{module.replace('_', '-')} {version}", [f"{name} = '{module}:{name}'"], files)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    sources = tmp_path_factory.mktemp("sources")
    target = tmp_path_factory.mktemp("site")
    folders = [
        lone_module(sources / "lone", "lone_part", "1.0", "Lone"),
        lone_module(sources / "first", "first_twin", "1.5", "Twin"),
        lone_module(sources / "second", "second_twin", "2.5", "Twin"),
    ]
    return install(folders, target)


@pytest.fixture
def printed(site, monkeypatch, capsys):
    """Runs the command with the packages installed and gives the lines that it prints."""
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()

    def run(*arguments):
        assert plugins.run(list(arguments)) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_table_has_a_row_for_each_part_of_every_kind(printed):
    lines = printed()
    assert lines[0].split() == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "SUMMARY"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert set(rows) >= {"Lone", "SkewKL", "DatasetCurator", "Constant"}
    assert rows["Lone"].split(maxsplit=4) == ["Lone", "loss", "lone-part", "1.0", SUMMARY.strip()]


def test_columns_are_aligned(printed):
    lines = [line for line in printed() if not line.startswith("*")]
    start = lines[0].index("KIND")
    assert len(lines) > 4
    assert {line[start - 1] for line in lines} == {" "}
    assert " " not in {line[start] for line in lines}


def test_a_kind_lists_only_its_parts(printed):
    rows = printed("schedule")[1:]
    assert {row.split()[1] for row in rows} == {"schedule"}
    assert "Constant" in {row.split()[0] for row in rows}


def test_a_kind_without_parts_says_so(monkeypatch, capsys):
    monkeypatch.setattr(plugins, "entries", lambda kind: [])
    assert plugins.run(["verifier"]) == 0
    assert capsys.readouterr().out == "No verifier is installed.\n"


def test_two_parts_of_one_name_are_marked_and_explained(printed):
    lines = printed("loss")
    assert len([line for line in lines if line.startswith("Twin *")]) == 2
    notes = [line for line in lines if line.startswith("*")]
    assert len(notes) == 1
    assert "loss Twin comes from first-twin 1.5 (first_twin:Twin) and second-twin 2.5 (second_twin:Twin)" in notes[0]


def test_a_terminal_cuts_lines_to_its_width(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rows = [line for line in printed("loss") if not line.startswith("*")]
    assert max(map(len, rows)) == 70
    assert all(row.endswith("…") for row in rows if row.startswith(("Lone", "Twin")))


def test_json_holds_every_field(printed):
    records = json.loads("\n".join(printed("loss", "--json")))
    lone = {"name": "Lone", "kind": "loss", "distribution": "lone-part", "version": "1.0", "target": "lone_part:Lone"}
    assert {**lone, "summary": SUMMARY.strip(), "also_from": []} in records
    twins = {record["distribution"]: record["also_from"] for record in records if record["name"] == "Twin"}
    assert twins == {
        "first-twin": ["second-twin 2.5 (second_twin:Twin)"],
        "second-twin": ["first-twin 1.5 (first_twin:Twin)"],
    }


def test_an_unknown_kind_is_an_error_with_the_nearest():
    with pytest.raises(PluginError, match=r"^There is no kind of part named 'curators'\. Did you mean curator\?$"):
        plugins.run(["curators"])


def test_options_are_not_guessed_from_their_beginning(capsys):
    with pytest.raises(SystemExit):
        plugins.run(["--js"])
    assert "unrecognized arguments: --js" in capsys.readouterr().err


def test_the_command_imports_neither_torch_nor_a_plugin(site, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    code = "import sys; from distillkit.cli.plugins import run; run([]); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lone-part" in done.stdout
    imported = set(done.stderr.split())
    assert "distillkit.registry" in imported
    assert not imported & {"torch", "lightning", "rich", "lone_part", "first_twin", "second_twin", "distillkit.losses"}

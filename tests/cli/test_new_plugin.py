"""A package that the command wrote installs, passes its own tests and is found by name, all as it was written."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distillkit import registry
from distillkit.cli import new_plugin
from distillkit.config.files import load
from distillkit.errors import PluginError
from helpers import workspace
from helpers.packages import install, python_path
from helpers.warm import Warm

KINDS = new_plugin.kinds()


def name_of(kind):
    return f"distillkit-fresh.{kind}-part"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A package of each kind, and the folder into which pip has installed all of them."""
    root = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        assert new_plugin.run([name_of(kind), "--kind", kind, "--into", str(root / "sources")]) == 0
    written = {
        path.relative_to(root): path.read_text() for path in (root / "sources").rglob("*") if path.is_file()
    }  # pip leaves what it builds beside the sources
    install([root / "sources" / name_of(kind) for kind in KINDS], root / "site")
    return root, written


@pytest.fixture(scope="module")
def passed(packages):
    """The tests that pass when pytest runs those of all packages, each in its folder."""
    root, _ = packages
    folders = [str(root / "sources" / name_of(kind)) for kind in KINDS]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--import-mode=importlib", *folders]
    environment = os.environ | {"PYTHONPATH": python_path(root / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-W", "error"], env=environment, capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return re.findall(r"^\S*?(test_\w+)\.py::(\S+) PASSED", done.stdout, re.MULTILINE)


def test_every_kind_of_part_has_a_template():
    assert set(KINDS) == set(registry.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_package_passes_its_own_tests(passed, kind):
    own = [test for file, test in passed if file == f"test_fresh_{kind}_part"]
    assert len([test for test in own if test.startswith("TestContract::")]) >= 4
    assert "test_the_configuration_names_the_installed_part" in own


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_template_is_left(packages, kind):
    _, written = packages
    own = {path: text for path, text in written.items() if path.parts[1] == name_of(kind)}
    module = f"distillkit_fresh_{kind}_part"
    assert {str(Path(*path.parts[2:])) for path in own} == {
        "README.md",
        "pyproject.toml",
        f"{module}/__init__.py",
        f"{module}/{kind}.py",
        f"{module}/fresh_{kind}_part.yaml",
        f"tests/test_fresh_{kind}_part.py",
    }
    for path, text in own.items():
        assert not re.search(r"my.plugin|myplugin|my_method|my_kind|my_group", f"{path} {text}", re.IGNORECASE), path
        assert f"Fresh{kind.capitalize()}Part" in text, path


@pytest.mark.parametrize("kind", KINDS)
def test_an_installed_package_is_listed_and_has_its_configuration_with_it(packages, kind, monkeypatch):
    root, written = packages
    monkeypatch.syspath_prepend(root / "site")
    importlib.invalidate_caches()
    part = f"Fresh{kind.capitalize()}Part"
    found = [entry for entry in registry.entries(kind) if entry.name == part]
    assert [entry.distribution for entry in found] == [name_of(kind)]
    assert registry.summary(found[0]).endswith(".")
    module = f"distillkit_fresh_{kind}_part"
    config = load(root / "site" / module / f"fresh_{kind}_part.yaml")
    assert part in str(config)
    project = tomllib.loads(written[Path("sources", name_of(kind), "pyproject.toml")])
    assert project["project"]["entry-points"] == {registry.KINDS[kind]: {part: f"{module}.{kind}:{part}"}}


@pytest.fixture(scope="module")
def warm(packages):
    """A process with the packages installed, and a folder of tiny models to run in."""
    root, _ = packages
    folder = workspace.make(root / "workspace")
    (folder / "second-teacher").symlink_to(folder / "teacher")
    with Warm(os.environ | {"PYTHONPATH": python_path(root / "site"), "HF_HUB_OFFLINE": "1"}) as process:
        yield process, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_of_a_written_package_trains(packages, warm, kind):
    process, folder = warm
    config = packages[0] / "site" / f"distillkit_fresh_{kind}_part" / f"fresh_{kind}_part.yaml"
    quick = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--data.batch_size=2"]
    command = ["fit", "--config", "pair.yaml", "--config", str(config), *quick]
    if kind == "generator":
        command.append("--model.curator.init_args.sampling.max_new_tokens=4")
    status, output = process.command([*command, f"--trainer.default_root_dir=runs/{kind}"], folder)
    assert status == 0, output
    assert f"Fresh{kind.capitalize()}Part" in (folder / "runs" / kind / "config.yaml").read_text()


@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff; tox -e lint checks the templates in place")
def test_a_written_package_is_clean_by_its_own_configuration(packages):
    root, _ = packages
    folders = [root / "sources" / name_of(kind) for kind in KINDS]
    sources = [path for folder in folders for path in folder.rglob("*.py") if "build" not in path.parts]
    assert len(sources) == 3 * len(KINDS)
    for command in (["check", "--no-cache", "--extend-select", "I"], ["format", "--no-cache", "--check"]):
        done = subprocess.run(["ruff", *command, *sources], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-loss", r"^NAME may contain letters, digits, '-', '_' and '\.', and must start and end with .*, got '-lo"),
        ("my loss", r"got 'my loss'"),
        ("größe", r"got 'größe'"),
        ("loss\n", r"got 'loss\\n'"),
        ("", r"got ''"),
        ("3d-loss", r"'3d-loss' would name the module '3d_loss', which Python does not allow"),
        ("class", r"would name the module 'class', which Python does not allow"),
        ("distillkit-3d", r"would name the class '3d', which Python does not allow"),
        ("distillkit-none", r"would name the class 'None', which Python does not allow"),
        ("distillkit-", r"must start and end with a letter or digit"),
        ("tests", r"would name the module 'tests', like a folder of the package"),
        ("distillkit-token-loss", r"would name the class 'TokenLoss', which its module imports"),
        ("distillkit-Forward-KL", r"the loss 'ForwardKL', which distillkit \S+ \(distillkit\.losses\.\S+\) already"),
        ("Lightning", r"^A distribution named 'Lightning' is installed, and the package would replace it"),
        ("json", r"would name the module 'json', which is already installed"),
    ],
)
def test_a_name_that_would_break_something_is_refused(tmp_path, name, message):
    with pytest.raises(PluginError, match=message):
        new_plugin.run([f"--into={tmp_path}", "--kind=loss", "--", name])
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_another_kind_has_is_free(tmp_path, capsys):
    assert new_plugin.run(["distillkit-Forward-KL", "--kind", "curator", "--into", str(tmp_path)]) == 0
    assert "the curator ForwardKL" in capsys.readouterr().out


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "fresh-loss").mkdir()
    with pytest.raises(PluginError, match=r"fresh-loss already exists and is not overwritten"):
        new_plugin.run(["fresh-loss", "--kind", "loss", "--into", str(tmp_path)])
    assert list((tmp_path / "fresh-loss").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_above_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match=r"file\S* can't be written \(.+\)\. Use another --into"):
        new_plugin.run(["fresh-loss", "--kind", "loss", "--into", str(tmp_path / "file")])


def test_an_unknown_kind_is_an_error_that_names_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit):
        new_plugin.run(["fresh-loss", "--kind", "los", "--into", str(tmp_path)])
    said = capsys.readouterr().err
    assert all(kind in said for kind in KINDS)


def test_it_says_what_to_do_next_without_importing_anything_heavy(tmp_path):
    code = (
        "import sys; from distillkit.cli.main import main;"
        "status = main(['new-plugin', 'fresh-loss', '--kind', 'loss', '--into', sys.argv[1]]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert str(tmp_path / "fresh-loss" / "fresh_loss" / "loss.py") in done.stdout
    assert f'pip install -e "{tmp_path / "fresh-loss"}[test]"' in done.stdout
    assert "distillkit.registry" in done.stderr.split()
    assert {"torch", "lightning", "transformers", "yaml"}.isdisjoint(done.stderr.split())

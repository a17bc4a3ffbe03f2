"""Checks of every package under plugins: it is complete, small and documented, and its configurations train."""

import ast
import csv
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distillkit import registry
from distillkit.cli import main
from helpers.answers import shorten
from helpers.runs import save_models, write_prompts

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
CONFIGS = sorted(path for package in PACKAGES for path in package.glob("distillkit_*/*.yaml"))
NAMES = {package.name for package in PACKAGES}
MOST_LINES = 150
"""Lines of code in a package, without blank lines, comments and docstrings."""

pytestmark = [
    # One optimizer step is fewer than the logging interval of base.yaml.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packages")
    save_models(root)
    write_prompts(root / "train.jsonl", 2, response=True)
    write_prompts(root / "val.jsonl", 2, response=True)
    return root


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    log = logging.getLogger("distillkit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = before


def test_the_packages_are_found() -> None:
    assert len(PACKAGES) >= 7
    assert {path.parents[1] for path in CONFIGS} == set(PACKAGES), "each brings its configuration"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_whole_and_small(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == package.name
    assert project["dependencies"] == ["distillkit"]
    module = package.name.replace("-", "_")
    readme = (package / "README.md").read_text()
    assert f"pip install ./plugins/{package.name}" in readme
    assert f"pkg:{module}/" in readme
    assert "arXiv" in readme or "2025" in readme, "the paper"
    counted = sum(num_code_lines(path) for path in (package / module).glob("*.py"))
    assert counted <= MOST_LINES
    for group, parts in project.get("entry-points", {}).items():
        kind = next(kind for kind, kind_group in registry.KINDS.items() if kind_group == group)
        for name in parts:
            assert registry.get(kind, name).__module__.startswith(module), "install the package before its tests"


def num_code_lines(path: Path) -> int:
    """Lines with code on them."""
    tree = ast.parse(path.read_text())
    docs = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(bool(text.strip()) and not text.strip().startswith("#") and line not in docs for line, text in lines)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_method_has_a_page(config: Path) -> None:
    pages = list((ROOT / "docs" / "methods").glob("*.md"))
    named = f"pkg:{config.parent.name}/{config.name}"
    matching = [page for page in pages if named in page.read_text()]
    assert len(matching) == 1, f"one page under docs/methods shows {named}"
    for word in ("**Source:**", "**Loss:**", "**Data:**"):
        assert word in matching[0].read_text()
    assert f"(methods/{matching[0].name})" in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_method_takes_a_step_by_the_name_of_its_package(config: Path, folder: Path, tmp_path: Path) -> None:
    assert re.match(r"# .*20\d\d", config.read_text()), "the first line says which paper it is"
    arguments = [
        f"--config={ROOT / 'configs' / 'base.yaml'}",
        f"--config=pkg:{config.parent.name}/{config.name}",
        "--model.teacher=TransformersTeacher",
        f"--model.teacher.source={folder / 'teacher'}",
        f"--model.student.source={folder / 'student'}",
        f"--data.train={folder / 'train.jsonl'}",
        f"--data.val={folder / 'val.jsonl'}",
        "--data.batch_size=2",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.log_every_n_steps=1",
    ]
    assert main(["fit", *arguments]) == 0
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) == 1
    assert losses[0] == losses[0], "not NaN"
    assert (tmp_path / "export" / "model.safetensors").exists()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["loss"]["class_path"]
    assert saved.rpartition(".")[2] == yaml.safe_load(config.read_text())["model"]["loss"]["class_path"]


def test_what_is_installed_changes_no_run_that_does_not_name_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(out: str) -> dict[str, torch.Tensor]:
        arguments = [
            f"--config={ROOT / 'configs' / 'base.yaml'}",
            f"--config={ROOT / 'configs' / 'methods' / 'distillm2.yaml'}",
            "--model.teacher=TransformersTeacher",
            f"--model.teacher.source={folder / 'teacher'}",
            f"--model.student.source={folder / 'student'}",
            f"--data.train={folder / 'train.jsonl'}",
            "--data.batch_size=2",
            f"--trainer.default_root_dir={tmp_path / out}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.log_every_n_steps=1",
        ]
        assert main(["fit", *arguments]) == 0
        return load_file(tmp_path / out / "export" / "model.safetensors")

    with_packages = train("with")
    every = [point for group in registry.KINDS.values() for point in metadata.entry_points(group=group)]
    built_in = metadata.EntryPoints(point for point in every if not (point.dist and point.dist.name in NAMES))
    assert len(built_in) < len(every)
    monkeypatch.setattr(metadata, "entry_points", lambda **selection: built_in.select(**selection))
    assert not {entry.distribution for entry in registry.entries()} & NAMES
    without = train("without")
    assert with_packages.keys() == without.keys()
    assert all(torch.equal(with_packages[name], without[name]) for name in without)


def test_a_run_imports_no_package_that_it_does_not_name(folder: Path) -> None:
    arguments = [
        "fit",
        "--print_config",
        f"--config={ROOT / 'configs' / 'methods' / 'distillm2.yaml'}",
        "--model.teacher=TransformersTeacher",
        f"--model.teacher.source={folder / 'teacher'}",
        f"--model.student.source={folder / 'student'}",
        f"--data.train={folder / 'train.jsonl'}",
    ]
    code = (
        "import atexit, sys; from distillkit.cli import main;"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "DistiLLM2" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "distillkit" in loaded
    assert not loaded & {name.replace("-", "_") for name in NAMES}

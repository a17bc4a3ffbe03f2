"""The rules that hold the code together: import layers, file lengths, a place in the documentation for every part."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import grimp
import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from distillkit import callbacks, registry
from distillkit.cli.main import VERBS
from distillkit.workflows import launch
from helpers.docs import ROOT

MAX_LINES = 400
MAX_FUNCTION = 50
"""Lines of a function, without its docstring."""

PARTS = {
    "loss": {
        "CrossEntropy",
        "DPKD",
        "DistiLLM2",
        "ForwardKL",
        "GeneralizedJSD",
        "JeffreysKL",
        "ReverseKL",
        "SkewKL",
        "SkewReverseKL",
        "TotalVariation",
        "WeightedSum",
    },
    "curator": {
        "BestOfN",
        "DataPairs",
        "DatasetCurator",
        "FilteredCurator",
        "MixedCurator",
        "PairedCurator",
        "ReplayCurator",
        "SpeculativeCurator",
        "StrongerCurator",
        "StudentCurator",
        "TeacherCurator",
    },
    "schedule": {"AdaptiveAlpha", "Constant", "Cosine", "Linear", "Piecewise"},
    "generator": {
        "FileGenerator",
        "LocalGenerator",
        "ServerGenerator",
        "SpeculativeGenerator",
        "TransformersGenerator",
        "VLLMGenerator",
    },
    "teacher": {"CachedTeacher", "TransformersTeacher"},
    "verifier": {
        "Distinct",
        "MeanLogProb",
        "NumericAnswer",
        "PairwiseJudge",
        "PythonTests",
        "ReasoningGymAnswer",
        "TargetLength",
    },
    "source": {"MagpiePrompts", "ReasoningGym", "Source"},
    "filter": {"Empty", "Repeated", "TooLong", "Truncated"},
}

VERB_NAMES = {
    "init",
    "fit",
    "curate",
    "validate",
    "test",
    "evaluate",
    "export",
    "chat",
    "compare",
    "store",
    "methods",
    "plugins",
    "new-plugin",
}

CALLBACKS = {"Answers", "Budget", "Export", "FiniteLoss", "RunCheckpoint", "Throughput"}

METHODS = {
    "distillm2",
    "distillm2-as-released",
    "dpkd",
    "gkd",
    "imitkd",
    "kd",
    "rkl",
    "seqkd",
    "sft",
    "skl",
    "speculative_kd",
    "speculative_kd-on-policy",
}

# The page with a row or a paragraph for each part of a kind.
PAGE_OF_KIND = {
    "loss": "docs/losses.md",
    "curator": "docs/curators.md",
    "schedule": "docs/schedules.md",
    "generator": "docs/models.md",
    "teacher": "docs/models.md",
    "verifier": "docs/verifiers.md",
    "source": "docs/data.md",
    "filter": "docs/curators.md",
}

SOURCE = ROOT / "src" / "distillkit"

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("**/*.yaml"))


# ── frozen names: a change to them is a change to this list ───────────────────────────────────────────────────────────


def test_the_entry_points_are_these():
    assert set(registry.KINDS) == set(PARTS)
    for kind, names in PARTS.items():
        assert {entry.name for entry in registry.entries(kind) if entry.distribution == "distillkit"} == names


def test_an_entry_point_has_the_name_of_its_class():
    points = [point for group in registry.KINDS.values() for point in metadata.entry_points(group=group)]
    own = [point for point in points if point.dist is not None and point.dist.name == "distillkit"]
    assert len(own) == sum(map(len, PARTS.values()))
    assert all(point.name == point.attr for point in own)


def test_the_verbs_are_these():
    assert set(VERBS) == VERB_NAMES


def test_the_callbacks_are_these():
    public = {name: getattr(callbacks, name) for name in callbacks.__all__}
    classes = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, Callback)}
    assert classes == CALLBACKS
    assert vars(launch).keys() >= CALLBACKS, "launch imports each, so that a configuration can say its short name"


def test_the_methods_are_these():
    assert {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")} == METHODS


# ── documentation ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in PAGE_OF_KIND for name in sorted(PARTS[kind])])
def test_every_part_is_documented(kind, name):
    page = PAGE_OF_KIND[kind]
    text = (ROOT / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    in_prose = kind in ("generator", "teacher") and f"`{name}`" in text
    assert in_prose or len(rows) == 1, f"{page} needs one row `| `{name}` | … |`"


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_every_callback_has_a_row(name):
    assert f"\n| `{name}` |" in (ROOT / "docs" / "configs.md").read_text()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_page_that_shows_its_command(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert f"--config configs/methods/{name}.yaml" in page
    for word in ("**Source:**", "**Loss:**", "**Data:**"):
        assert word in page
    assert f"(methods/{name}.md)" in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.parametrize("verb", sorted(VERB_NAMES))
def test_every_verb_has_a_row_in_the_readme(verb):
    assert f"\n| `distillkit {verb}` |" in (ROOT / "README.md").read_text()


def test_the_readme_has_a_line_for_every_file_and_folder():
    text = (ROOT / "README.md").read_text()
    source = ROOT / "src" / "distillkit"
    names = [f"{path.name}/" for path in source.iterdir() if (path / "__init__.py").exists()]
    names += [path.name for path in source.glob("*.py") if path.name != "__init__.py"]
    assert len(names) > 15
    missing = [name for name in names if f"| `src/distillkit/{name}` |" not in text]
    assert not missing, f"README.md, Where things are: a row is missing for {missing}"
    listed = re.findall(r"^\| `((?:src|configs|tests|docs)/[\w./-]*)` \|", text, re.MULTILINE)
    assert listed
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_the_layers_in_the_documentation_are_those_of_the_contract():
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert contract is not None
    layers = [[name.strip() for name in line.split("|")] for line in re.findall(r'"([^"]+)"', contract[1])]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers")[2].partition("##")[0]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert shown == layers
    drawing = (ROOT / "docs" / "images" / "layers.svg").read_text()
    assert [names.split(", ") for names in re.findall(r'class="layer"[^>]*>([^<]+)<', drawing)] == layers


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    found = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md")]
    assert len(found) > 15
    assert [page for page in found if page != "index.md" and f"({page})" not in index] == []


# ── code ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the source in `folder`."""
    code = "import sys; sys.path.insert(0, 'src'); from importlinter import cli; cli.lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def test_imports_keep_to_the_layers():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def import_graph(**options: bool) -> grimp.ImportGraph:
    """Which module imports which, those that a package imports when a public name is used included."""
    graph = grimp.build_graph("distillkit", cache_dir=None, **options)
    for stub in SOURCE.rglob("__init__.pyi"):
        package = module_of(stub)
        for node in ast.walk(ast.parse(stub.read_text())):
            if isinstance(node, ast.ImportFrom):
                graph.add_import(importer=package, imported=f"{package}.{node.module}")
    return graph


def test_no_module_imports_itself_through_others():
    """Imports inside functions and those for types alone count: they hide a circle, they don't cut it."""
    graph = import_graph()
    modules = {module_of(path) for path in SOURCE.rglob("*.py") if "templates" not in path.relative_to(SOURCE).parts}
    assert modules == graph.modules, "every module is looked at, and no package names a file that is not there"
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(list(TopologicalSorter(imports).static_order())) == len(modules)  # CycleError names the circle


def test_no_folder_imports_itself_through_others():
    graph = grimp.build_graph("distillkit", cache_dir=None)
    imports: dict[str, set[str]] = {}
    for module in graph.modules - {"distillkit"}:
        others = {folder_of(own) for own in graph.find_modules_directly_imported_by(module)} - {folder_of(module)}
        imports.setdefault(folder_of(module), set()).update(others - {"distillkit"})
    assert len(list(TopologicalSorter(imports).static_order())) == len(imports) > 20


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_few_files_lie_outside_of_the_folders():
    flat = {path.stem for path in SOURCE.glob("*.py")}
    assert flat == {"__init__", "__main__", "errors", "interfaces", "registry", "run_folder"}


def test_the_command_is_small():
    files = list((SOURCE / "cli").glob("*.py"))
    assert files
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1500


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_an_import_that_breaks_a_layer_is_found(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    with (tmp_path / "src" / "distillkit" / "losses" / "kl.py").open("a") as file:
        file.write("\nfrom distillkit.cli import main as _main\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "distillkit.losses is not allowed to import distillkit.cli" in done.stdout
    assert "distillkit.losses.kl -> distillkit.cli" in done.stdout


def test_no_file_is_too_long():
    files = [path for name in ("src", "tests", "plugins") for path in (ROOT / name).glob("**/*.py")]
    assert len(files) > 50
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_is_too_long():
    files = [path for path in SOURCE.rglob("*.py") if "templates" not in path.relative_to(SOURCE).parts]
    lengths = {
        f"{path.relative_to(SOURCE).as_posix()}:{node.name}": lines_of(node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length >= MAX_FUNCTION} == {}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, from `def` to its end, without the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    documented = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
    return function.end_lineno - function.lineno + 1 - documented


MATHEMATICS = ("losses", "schedules", "divergences", "chunked", "types", "interfaces", "data.align")
FOR_ANY_TRAINER = {"torch"}
HEAVY = {"torch", "lightning", "pytorch_lightning", "transformers", "datasets"}


def imported_by(code: str) -> set[str]:
    """The heavy packages that a Python program imports."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split()) & HEAVY


def test_losses_and_schedules_import_neither_lightning_nor_transformers():
    stars = "; ".join(f"from distillkit.{name} import *" for name in MATHEMATICS)  # every public name
    assert imported_by(stars) == FOR_ANY_TRAINER


def test_the_mathematics_reaches_no_trainer_through_a_package():
    graph = import_graph(include_external_packages=True)
    modules = {f"distillkit.{name}" for name in MATHEMATICS}
    for name in modules:
        reached = graph.find_upstream_modules(name, as_package=True)
        assert not reached & HEAVY - FOR_ANY_TRAINER
    assert "torch" in graph.find_upstream_modules("distillkit.losses", as_package=True)


def test_importing_distillkit_or_a_package_of_it_imports_nothing_heavy():
    packages = [
        path.parent for path in SOURCE.rglob("__init__.py") if "templates" not in path.relative_to(SOURCE).parts
    ]
    assert len(packages) > 20
    assert imported_by("; ".join(f"import {module_of(package / '__init__.py')}" for package in packages)) == set()


def test_listing_plugins_imports_nothing_heavy():
    code = "import sys; from distillkit.cli.main import main; main(['plugins']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "SkewKL" in done.stdout
    assert {"torch", "lightning", "transformers"}.isdisjoint(done.stderr.split())


def test_there_are_configurations():
    assert len(CONFIGS) > 12
    assert {path.partition("/")[2].partition("/")[0] for path in CONFIGS} >= {"base.yaml", "methods", "models"}


@pytest.mark.parametrize("path", CONFIGS)
def test_every_configuration_says_what_it_is_and_parses(path):
    text = (ROOT / path).read_text()
    assert text.startswith("# "), f"{path}: the first line says what it is"
    content = yaml.safe_load(text)
    assert isinstance(content, dict)
    if "methods" in content:  # a comparison; tests/comparison/test_compare.py parses it
        return
    assert set(content) <= {"base", "trainer", "model", "data", "seed_everything", "ckpt_path"}

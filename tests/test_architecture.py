"""The rules that hold the code together: import layers, file lengths, a place in the documentation for every part."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

import distillkit
from distillkit import callbacks, registry
from distillkit.cli.main import VERBS
from pages import ROOT

MAX_LINES = 400

PUBLIC_NAMES = ["DistillData", "DistillModule", "Lora", "Sampling", "Student", "TokenLoss", "__version__"]

PARTS = {
    "loss": {
        "CrossEntropy", "DPKD", "DistiLLM2", "ForwardKL", "GeneralizedJSD", "JeffreysKL", "ReverseKL", "SkewKL",
        "SkewReverseKL", "TotalVariation", "WeightedSum",
    },
    "curator": {
        "BestOfN", "DatasetCurator", "FilteredCurator", "MixedCurator", "PairedCurator", "ReplayCurator",
        "SpeculativeCurator", "StrongerCurator", "StudentCurator", "TeacherCurator",
    },
    "schedule": {"AdaptiveAlpha", "Constant", "Cosine", "Linear", "Piecewise"},
    "generator": {
        "FileGenerator", "LocalGenerator", "ServerGenerator", "SpeculativeGenerator", "TransformersGenerator",
        "VLLMGenerator",
    },
    "teacher": {"CachedTeacher", "TransformersTeacher"},
    "verifier": {
        "Distinct", "MeanLogProb", "NumericAnswer", "PairwiseJudge", "PythonTests", "ReasoningGymAnswer",
        "TargetLength",
    },
}  # fmt: skip

VERB_NAMES = {"fit", "curate", "validate", "test", "evaluate", "compare", "store", "plugins", "new-plugin"}

CALLBACKS = {"Answers", "Budget", "Export", "FiniteLoss", "RunCheckpoint", "Throughput"}

METHODS = {"distillm2", "distillm2-as-released", "dpkd", "kd", "rkl", "seqkd", "sft", "skl", "speculative_kd"}

# The page with a row or a paragraph for each part of a kind.
PAGE_OF_KIND = {
    "loss": "docs/losses.md",
    "curator": "docs/curators.md",
    "schedule": "docs/schedules.md",
    "generator": "docs/models.md",
    "teacher": "docs/models.md",
    "verifier": "docs/verifiers.md",
}

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("**/*.yaml"))


# ── frozen names: a change to them is a change to this list ───────────────────────────────────────────────────────────


def test_the_public_names_are_these():
    assert sorted(distillkit.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(distillkit, name) is not None


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
    assert set(callbacks.__all__) == CALLBACKS
    assert all(issubclass(getattr(callbacks, name), Callback) for name in CALLBACKS)


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


def test_losses_and_schedules_import_neither_lightning_nor_transformers():
    code = (
        "import sys, distillkit.losses, distillkit.schedules, distillkit.divergences, distillkit.align;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in modules
    assert {"lightning", "pytorch_lightning", "transformers", "datasets"}.isdisjoint(modules)


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
    if "methods" in content:  # a comparison; tests/cli/test_compare.py parses it
        return
    assert set(content) <= {"base", "trainer", "model", "data", "seed_everything", "ckpt_path"}

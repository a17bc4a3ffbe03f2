"""A stranger's package, installed by pip, is used by name from YAML; what others break stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.models import save_tiny
from helpers.packages import install, python_path, write_package

LOSS = '''
    """A loss of a stranger."""

    from distillkit import TokenLoss


    class Hellinger(TokenLoss):
        """Squared Hellinger distance, 1 - sum sqrt(p q)."""

        def divergence(self, logp, logq):
            return 1.0 - (0.5 * (logp + logq)).exp().sum(-1)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, prompts, and four installed packages: one good, one broken, two with a part of one name."""
    root = tmp_path_factory.mktemp("stranger")
    twin = LOSS.replace("Hellinger", "Twin")
    packages = {
        "hellinger-loss 1.0": (["Hellinger = 'hellinger_loss:Hellinger'"], {"hellinger_loss.py": LOSS}),
        "broken-loss 2.0": (["Broken = 'broken_loss:Broken'"], {"broken_loss.py": "import no_such_module\n"}),
        "first-twin 1.5": (["Twin = 'first_twin:Twin'"], {"first_twin.py": twin}),
        "second-twin 2.5": (["Twin = 'second_twin:Twin'"], {"second_twin.py": twin}),
    }
    trees = [write_package(root / "sources" / name.split()[0], name, *content) for name, content in packages.items()]
    install(trees, root / "site")
    save_tiny(root / "teacher", seed=1)
    save_tiny(root / "student", seed=2)
    (root / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "response": "Yes."}) + "\n" for n in range(4))
    )
    return root


def fit(folder: Path, loss: str, name: str) -> subprocess.CompletedProcess[str]:
    config = {
        "trainer": {
            "default_root_dir": str(folder / name),
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
        },
        "model": {
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": str(folder / "teacher")}},
            "student": {"source": str(folder / "student")},
            "loss": loss,
        },
        "data": {"train": str(folder / "train.jsonl"), "batch_size": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "distillkit.cli.main", "fit", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": python_path(folder / "site")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_loss_is_trained_with_by_its_name(folder: Path) -> None:
    done = fit(folder, "Hellinger", "good")
    assert done.returncode == 0, done.stderr
    saved = yaml.safe_load((folder / "good" / "config.yaml").read_text())
    assert "train/loss" in (folder / "good" / "csv" / "version_0" / "metrics.csv").read_text()
    assert saved["model"]["loss"]["class_path"] == "hellinger_loss.Hellinger"


def test_a_broken_plugin_fails_only_the_run_that_names_it(folder: Path) -> None:
    done = fit(folder, "Broken", "broken")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("model.loss", "Broken", "broken-loss 2.0", "no_such_module", "broken_loss.py"))


def test_two_parts_of_one_name_are_an_error_that_names_both(folder: Path) -> None:
    done = fit(folder, "Twin", "twin")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("Twin", "first-twin 1.5", "second-twin 2.5"))

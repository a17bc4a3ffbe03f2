"""What a configuration says of curators around others and of prompts reaches the parts."""

from pathlib import Path

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.curators.best_of_n import SEED_STRIDE
from distillkit.storage.responses import ResponseStore
from helpers.runs import QUIET, save_models, write_config, write_prompts


def part(name, **settings):
    return {"class_path": name, "init_args": settings}


@pytest.fixture
def config(tmp_path: Path):
    teacher, student = save_models(tmp_path)
    settings = {
        "trainer": QUIET | {"default_root_dir": str(tmp_path / "run"), "max_epochs": 1},
        "model": {
            "student": {"source": student},
            "teacher": part("TransformersTeacher", source=teacher, dtype="float32"),
            "loss": part("ForwardKL"),
            "curator": part(
                "BestOfN",
                n=3,
                verifier=part("TargetLength", target=2),
                curator=part("TeacherCurator", sampling={"max_new_tokens": 4}),
            ),
        },
        "data": {"train": write_prompts(tmp_path / "train.jsonl", 4, response=True), "batch_size": 2},
    }
    return lambda **data: write_config(tmp_path / "run.yaml", settings | {"data": settings["data"] | data})


def printed(capsys, path):
    with pytest.raises(SystemExit):
        main(["fit", "--config", path, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_source_of_prompts_is_named_by_its_short_name(config, capsys):
    source = part("MagpiePrompts", source="./teacher", num_prompts=7, sampling={"seed": 3})
    train = printed(capsys, config(train=source))["data"]["train"]
    assert train["class_path"] == "distillkit.generators.MagpiePrompts"
    assert (train["init_args"]["num_prompts"], train["init_args"]["sampling"]["seed"]) == (7, 3)


def test_sets_to_decontaminate_against_may_be_paths_and_sources(config, capsys):
    against = ["val.jsonl", {"path": "test.jsonl", "limit": 2}]
    found = printed(capsys, config(decontaminate={"ngram": 8, "against": against}))["data"]["decontaminate"]
    assert (found["ngram"], found["against"][0]) == (8, "val.jsonl")
    assert found["against"][1]["init_args"]["limit"] == 2


def test_the_best_of_several_is_trained_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler holds a closed stream
    assert main(["fit", "--config", config()]) == 0
    shards = ResponseStore(tmp_path / "run" / "responses").shards()
    assert sorted(shard["sampling"]["seed"] for shard in shards) == [0, SEED_STRIDE, 2 * SEED_STRIDE]
    assert {shard["responses"] for shard in shards} == {4}


def test_a_part_that_does_not_exist_is_refused_by_name(config, tmp_path, capsys):
    text = Path(config()).read_text().replace("TargetLength", "TargetLenght")
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "wrong.yaml")]) != 0
    assert "model.curator.verifier: No installed verifier is named 'TargetLenght'. Similar names: TargetLength." in (
        capsys.readouterr().err
    )

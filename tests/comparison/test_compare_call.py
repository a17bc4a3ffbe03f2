"""A comparison, called from Python: its runs are processes of the real command."""

import json
from pathlib import Path

import pytest
import yaml

from distillkit.comparison import compare
from helpers.runs import QUIET, save_models, write_prompts

PART = """from distillkit.losses import ForwardKL


class Renamed(ForwardKL):
    pass
"""


def test_compare_trains_measures_and_gives_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = save_models(tmp_path)
    common = {
        "trainer": {key: QUIET[key] for key in ("enable_model_summary", "accelerator")},
        "data": {
            "train": write_prompts(tmp_path / "train.jsonl", 2, response=True),
            "val": write_prompts(tmp_path / "val.jsonl", 2, response=True),
            "batch_size": 2,
        },
        "model": {
            "student": {"source": student},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": teacher, "dtype": "float32"}},
            "answers": {"temperature": 0.0, "max_new_tokens": 4},
        },
    }
    (tmp_path / "beside.py").write_text(PART)  # found as `python -m` and notebooks find it: by an empty path
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    method = {"model": {"loss": "beside.Renamed", "curator": "DatasetCurator"}}
    plan = {"out": str(tmp_path / "out"), "common": common, "methods": {"kd": method}, "budget": {"steps": 1}}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(plan))
    lines: list[str] = []
    done = compare(file, on_message=lines.append)
    assert done.is_complete, "\n".join(lines)
    assert done.folder == tmp_path / "out"
    assert [method["name"] for method in done.results["methods"]] == ["kd"]
    written = json.loads((done.folder / "results.json").read_text())
    assert written["command"] == f"distillkit compare --config {file}"
    assert [run["status"] for run in written["runs"]] == ["done"]
    assert lines[0].endswith(f"1 runs into {tmp_path / 'out'}")

    again = compare(file, only_report=True)
    assert again.is_complete
    values = [found["methods"][0]["metrics"]["kl"]["values"] for found in (done.results, again.results)]
    assert values[0] == values[1]

"""Tasks of lm-eval, of a task of our own whose answer is known."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from distillkit.errors import ConfigError
from distillkit.evaluation.lm_eval import Harness
from distillkit.testing.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    ("The capital of France is", [" Paris", " water", " seven"], 0),
    ("A week has", [" a sea", " seven days", " Paris"], 1),
    ("The sea is", [" wide", " capital", " five"], 0),
    ("Once upon a time", [" two", " rest", " there was"], 2),
    ("The wind moves", [" France", " over the water", " user"], 1),
]


def write_task(folder: Path) -> None:
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "train",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")},
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.lm_eval
@pytest.mark.filterwarnings("ignore")
def test_the_figure_is_the_share_of_choices_that_the_model_finds_likeliest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    tokenizer = tiny_tokenizer()
    harness = Harness(["tiny_choice"], include=str(tmp_path), batch_size=2)
    harness.check()
    shares = set()
    for seed in range(3):
        model = tiny_model(len(tokenizer), seed=seed)
        right = 0
        for question, choices, answer in QUESTIONS:
            scores = []
            for choice in choices:
                ids = tokenizer(question, add_special_tokens=False)["input_ids"]
                own = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([own])).logits[0].log_softmax(-1)
                scores.append(sum(float(logits[place - 1, own[place]]) for place in range(len(ids), len(own))))
            right += scores.index(max(scores)) == answer
        figures = harness.run(model, tokenizer)
        assert figures["tiny_choice_acc"] == pytest.approx(right / len(QUESTIONS))
        assert figures["tiny_choice_acc_stderr"] >= 0
        shares.add(right)
    assert len(shares) > 1


@pytest.mark.lm_eval
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="lm-eval has no task no_such_task_at_all: `lm-eval ls tasks` lists them"):
        Harness(["no_such_task_at_all"]).check()


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'need its library: pip install "distillkit\[lm-eval\]"'):
        Harness(["arc_easy"]).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, r"Harness\.tasks is empty"),
        ({"tasks": ["a"], "limit": 0}, r"Harness\.limit must be at least 1, got 0"),
        ({"tasks": ["a"], "fewshot": -1}, r"Harness\.fewshot must be at least 0, got -1"),
        ({"tasks": ["a"], "batch_size": 0}, r"Harness\.batch_size must be at least 1, got 0"),
    ],
)
def test_a_setting_that_is_wrong_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Harness(**settings)

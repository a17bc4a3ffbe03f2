"""Tasks of Reasoning Gym as prompts, and its checks as a verifier."""

from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.data.encoding import encode_all
from distillkit.data.reasoning_gym import ReasoningGym
from distillkit.errors import ConfigError, DataError
from distillkit.models.tokenizers import eos_ids
from distillkit.testing import check_verifier
from distillkit.testing.tiny import tiny_tokenizer
from distillkit.testing.verifiers import VerifierContract
from distillkit.types import Prompts, Response
from distillkit.verifiers.reasoning_gym import ReasoningGymAnswer
from helpers.runs import QUIET, save_models, write_config, write_prompts

ARITHMETIC: dict[str, Any] = {"task": "basic_arithmetic", "size": 8, "seed": 3}


def prompts_of(**settings: Any) -> Prompts:
    tokenizer = tiny_tokenizer()
    records = ReasoningGym(**ARITHMETIC | settings).records()
    prompts, _ = encode_all(records, tokenizer, eos_ids(tokenizer, None), True, None, 2048, "error")
    return Prompts(tuple(prompts))


def answered(prompts: Prompts, *texts: str) -> list[Response]:
    return [Response(prompt.id, (1,), text, "stop") for prompt, text in zip(prompts, texts, strict=False)]


@pytest.mark.reasoning_gym
def test_an_answer_is_right_in_marks_or_alone_and_the_last_one_counts() -> None:
    prompts = prompts_of()
    right = [(prompt.reference or "").removeprefix("<answer>").removesuffix("</answer>") for prompt in prompts]
    judge = ReasoningGymAnswer(**ARITHMETIC)
    judge.check(prompts)
    assert judge.verify(prompts, answered(prompts, *right)) == [1.0] * len(prompts)
    assert judge.verify(prompts, answered(prompts, *(own.reference or "" for own in prompts))) == [1.0] * len(prompts)
    cut = [f"It is <answer>no</answer>, so <answer> {own}" for own in right]
    assert judge.verify(prompts, answered(prompts, *cut)) == [1.0] * len(prompts)
    assert judge.verify(prompts, answered(prompts, *(f"{own}1" for own in right))) == [0.0] * len(prompts)


@pytest.mark.reasoning_gym
def test_prompts_are_the_same_again_and_others_with_a_seed_that_is_far_away() -> None:
    first, again, other = prompts_of(), prompts_of(), prompts_of(seed=3 + 8)
    assert [own.id for own in first] == [own.id for own in again]
    assert [own.id for own in prompts_of(seed=4)][:-1] == [own.id for own in first][1:], (
        "the next seed is the next prompt"
    )
    assert not {own.id for own in first} & {own.id for own in other}
    assert "Give the final answer between <answer> and </answer>." in first[0].messages[-1]["content"]
    assert prompts_of(instruction="")[0].messages[-1]["content"].startswith("Calculate")


@pytest.mark.reasoning_gym
def test_prompts_of_another_task_are_refused() -> None:
    with pytest.raises(DataError, match="is none of them: use the same settings as in the prompts' source"):
        ReasoningGymAnswer(**ARITHMETIC).check(prompts_of(seed=4))


@pytest.mark.reasoning_gym
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "basic_arithmetics"}, "Reasoning Gym can't make the task 'basic_arithmetics'"),
        ({"settings": {"terms": 3}}, "Reasoning Gym can't make the task 'basic_arithmetic' with {'terms': 3}"),
    ],
)
def test_a_task_that_is_none_is_refused_early(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(**ARITHMETIC | settings).check()


@pytest.mark.reasoning_gym
def test_it_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VerifierContract, "prompts", lambda self: prompts_of())
    check_verifier(ReasoningGymAnswer(**ARITHMETIC))


@pytest.mark.reasoning_gym
def test_it_measures_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.raiseExceptions", False)
    _, student = save_models(tmp_path)
    source = {"class_path": "distillkit.data.reasoning_gym.ReasoningGym", "init_args": ARITHMETIC}
    config = write_config(
        tmp_path / "config.yaml",
        {
            "trainer": QUIET | {"default_root_dir": str(tmp_path / "run")},
            "model": {
                "student": {"source": student},
                "loss": "CrossEntropy",
                "answers": {"temperature": 0.0, "max_new_tokens": 4},
                "metrics": {"exact": {"class_path": "ReasoningGymAnswer", "init_args": ARITHMETIC}},
                "generator": {"class_path": "TransformersGenerator", "init_args": {"progress": False}},
            },
            "data": {"train": write_prompts(tmp_path / "train.jsonl", 2, response=True), "val": source},
        },
    )
    assert main(["evaluate", "--config", config, "--out", str(tmp_path / "out")]) == 0
    assert '"exact": 0.0' in (tmp_path / "out" / "evaluation.json").read_text()


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs its library: pip install "distillkit\[reasoning-gym\]"'):
        ReasoningGym("basic_arithmetic", 2).check()


@pytest.mark.parametrize("kind", [ReasoningGym, ReasoningGymAnswer])
def test_a_size_below_one_is_refused(kind: type) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\.size must be at least 1, got 0"):
        kind("basic_arithmetic", 0)

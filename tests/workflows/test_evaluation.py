"""Evaluation: its figures are those of the models, and what it writes holds them prompt by prompt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.cli import evaluate
from distillkit.cli.evaluate import _pop_flag
from distillkit.cli.main import main
from distillkit.errors import ConfigError
from helpers.locks import locked
from helpers.runs import QUIET, command, save_models, write_config, write_prompts

HELD_OUT, NEW_TOKENS = 5, 6


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with its configuration beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    teacher, student = save_models(root)
    settings = {
        "trainer": QUIET
        | {
            "default_root_dir": str(root / "run"),
            "max_steps": 2,
            "callbacks": [part("RunCheckpoint"), part("Export")],
        },
        "model": {
            "student": {"source": student, "lora": {"r": 2}},
            "teacher": part("TransformersTeacher", source=teacher, dtype="float32"),
            "loss": "ForwardKL",
            "generator": part("TransformersGenerator", progress=False),
            "optimizer": part("torch.optim.AdamW", lr=1e-2),
            "answers": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS},
        },
        "data": {
            "train": write_prompts(root / "train.jsonl", 4, response=True),
            "batch_size": 2,
            "val": write_prompts(root / "val.jsonl", HELD_OUT),
            "test": write_prompts(root / "test.jsonl", 2),
        },
    }
    assert command(["fit", "--config", write_config(root / "config.yaml", settings)]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def evaluated(run: Path) -> Path:
    """The evaluation of the run's last checkpoint."""
    assert command(["evaluate", "--run", str(run), "--out", str(run.parent / "out")]) == 0
    return run.parent / "out"


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an evaluation wrote."""
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return json.loads((folder / "evaluation.json").read_text()), [json.loads(line) for line in lines]


def by_hand(student: Path, teacher: Path, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Figures of each prompt by whole logits in float64, with the teacher's greedy responses."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (teacher, student)]
    figures = []
    for row in rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        whole = models[0].generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        start = prompt["input_ids"].shape[1]
        with torch.no_grad():
            p, q = (model(whole).logits[0, start - 1 : -1].double().softmax(-1) for model in models)
        tokens = whole[0, start:]
        figures.append(
            {
                "kl": float((p * (p.log() - q.log())).sum(-1).mean()),
                "nll": float(-q.log().gather(1, tokens[:, None]).mean()),
                "acceptance": float(torch.minimum(p, q).sum(-1).mean()),
            }
        )
    return figures


def test_each_prompts_figures_are_those_of_the_two_models(run: Path, evaluated: Path) -> None:
    found, rows = read(evaluated)
    assert len(rows) == found["num_prompts"] == HELD_OUT
    expected = by_hand(run / "export", run.parent / "teacher", rows)
    for row, own in zip(rows, expected, strict=True):
        assert {name: row["metrics"][name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-6)


def test_the_whole_is_the_mean_over_positions_and_answers(evaluated: Path) -> None:
    found, rows = read(evaluated)
    assert found["schema"] == 1
    positions = sum(row["positions"] for row in rows)
    assert found["num_positions"] == positions > 0
    for name in ("kl", "nll", "acceptance"):
        mean = sum(row["positions"] * row["metrics"][name] for row in rows) / positions
        assert found["metrics"][name] == pytest.approx(mean, rel=1e-6)
    for name in ("rouge_l", "distinct_2"):
        assert found["metrics"][name] == pytest.approx(sum(row["metrics"][name] for row in rows) / HELD_OUT)
    assert found["metrics"]["length"] == pytest.approx(sum(row["tokens"] for row in rows) / HELD_OUT)
    assert found["metrics"]["finished"] == sum(row["finish"] == "stop" for row in rows) / HELD_OUT
    assert found["generated_tokens"] == sum(row["tokens"] for row in rows)
    assert found["versions"]["torch"] == torch.__version__


def test_the_checkpoint_is_what_training_ended_with(run: Path, evaluated: Path) -> None:
    found, _ = read(evaluated)
    assert found["step"] == 2
    assert found["student"] == str(run / "checkpoints" / "last.ckpt")
    lines = (run / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    logged = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    last = [row for row in logged if row["val/kl"]][-1]
    assert found["metrics"]["kl"] == pytest.approx(float(last["val/kl"]), rel=1e-5)


def test_two_evaluations_do_not_write_into_one_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out") as pid:
        assert main(["evaluate", "--run", str(run), "--out", str(tmp_path / "out")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert f"distillkit evaluate: error: {tmp_path / 'out'} is in use: process {pid} on " in lines[0]
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_an_exported_folder_is_measured_alike(run: Path, evaluated: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--run", str(run), "--student", str(run / "export"), "--out", str(tmp_path / "out")]
    assert command(arguments) == 0
    (found, rows), (expected, expected_rows) = read(tmp_path / "out"), read(evaluated)
    assert found["student"] == str(run / "export")
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    assert [row["student"] for row in rows] == [row["student"] for row in expected_rows]


def test_verifiers_of_ones_own_drafts_and_the_test_prompts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--split", "test", "--draft", "3"]
    judge = "--model.metrics={short: {class_path: TargetLength, init_args: {target: 2}}}"
    config = str(run.parent / "config.yaml")
    root = f"--trainer.default_root_dir={tmp_path / 'other'}"
    assert main(["evaluate", "--config", config, root, judge, *arguments]) == 0
    found, rows = read(tmp_path / "out")
    assert found["split"] == "test"
    assert found["num_prompts"] == len(rows) == 2
    assert found["metrics"]["short"] == sum(-abs(row["tokens"] - 2) for row in rows) / 2
    assert "distinct_2" not in found["metrics"]
    assert 0 < found["metrics"]["drafted_acceptance"] <= 1
    assert 1 <= found["metrics"]["tokens_per_check"] <= 4
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line.count("  ") and "." in line]
    assert names.index("kl") < names.index("nll") < names.index("short")
    assert "KL(p‖q) to the teacher, nats per token of its responses" in printed
    assert printed.rstrip().endswith(str(tmp_path / "out"))


def test_several_answers_are_drawn_and_judged(run: Path, tmp_path: Path) -> None:
    judge = "--model.metrics={even: {class_path: helpers.judges.Even}, short: TargetLength}"
    arguments = ["--run", str(run), judge, "--samples", "4", "--out", str(tmp_path / "out")]
    arguments += ["--sampling", "{temperature: 1.5, max_new_tokens: 3}"]
    assert command(["evaluate", *arguments]) == 0
    found, rows = read(tmp_path / "out")
    counts = [row["metrics"]["even_passes"] for row in rows]
    assert set(counts) <= {0, 1, 2, 3, 4}
    assert len(set(counts)) > 1
    assert found["metrics"]["even_pass_at_1"] == pytest.approx(sum(counts) / 4 / HELD_OUT)
    assert found["metrics"]["even_pass_at_4"] == sum(count > 0 for count in counts) / HELD_OUT
    assert "short_pass_at_1" not in found["metrics"], "its numbers are not 0 and 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{run}", "--samples", "2"], "--samples needs a verifier that tells which answers are correct"),
        (["--run", "{run}", "--lm_eval", "{tasks: [no_such_task], limit: 2}"], "lm-eval"),
        (["--run", "{run}", "--lm_eval", "{tasks: [], limit: 2}"], "Harness.tasks is empty"),
        (["--run", "{run}", "--samples", "-2"], "--samples must be at least 0, got -2"),
        (["--run", "{run}", "--out", "{out}"], "contains an evaluation already. Choose another folder with --out"),
        (["--run", "{run}/nothing"], "nothing is not the folder of a run: it has no config.yaml"),
        (["--run", "{run}", "--draft", "-1"], "--draft must be at least 0, got -1"),
        (["--run", "{run}", "--split", "both"], "split"),
        (["--run", "{run}", "--model.metrics={kl: NumericAnswer}"], "the name 'kl': a metric of distillkit has it"),
        (["--run", "{run}", "--model.metrics={a: NumericAnswers}"], "No installed verifier is named 'NumericAnswers'"),
        (["--run", "{run}", "--model.metrics={a: NumericAnswer}"], "has no response, and one of model.metrics needs"),
        (["--run"], "--run needs the path of a folder"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    run: Path,
    evaluated: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "distillkit.training.module.DistillModule.configure_model", lambda self: pytest.fail("model loaded")
    )
    given = [argument.replace("{run}", str(run)).replace("{out}", str(evaluated)) for argument in arguments]
    assert main(["evaluate", *given]) == 1
    assert message in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"has no checkpoint .*last\.ckpt: name a model with --student FOLDER"):
        main_without_catching(["--run", str(tmp_path)])


def main_without_catching(arguments: list[str]) -> None:
    evaluate.run(arguments)


def test_a_flag_is_pop_flag_in_both_spellings_and_the_last_counts() -> None:
    assert _pop_flag(["--a", "--run", "x", "b", "--run=y"], "--run") == ("y", ["--a", "b"])
    assert _pop_flag(["--a"], "--run") == (None, ["--a"])


def test_no_answers_have_no_length() -> None:
    from distillkit.evaluation.report import answer_metrics

    assert all(math.isnan(value) for value in answer_metrics([]).values())

"""The quickstart from start to end: minutes, memory, held-out metrics, and twenty facts that its teacher knows.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --trained runs/quickstart

The first command trains; the second only asks the student of a finished run. The facts are in
`configs/prompts/quickstart-facts.jsonl`: no prompt of the training or the validation is among them. An answer is right
if it contains the expected word; both models answer greedily, with at most 48 tokens.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from results import add_output_options, table, write_json
from steps.workload import QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.models import Student
from distillkit.run_folder import EXPORT, read_metrics

FACTS = QUICKSTART.parent / "prompts" / "quickstart-facts.jsonl"
METRICS = ("val/kl", "val/acceptance", "val/rouge_l")
MAX_NEW_TOKENS = 48


def main() -> None:
    """Trains unless told otherwise, and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of the run that is trained")
    parser.add_argument("--trained", type=Path, help="a finished run, whose student answers without training")
    add_output_options(parser, "quickstart.json")
    options = parser.parse_args()
    costs = {} if options.trained else trained(options.config, options.run)
    run = options.trained or options.run
    history = {name: [value for _, value in read_metrics(run)[name]] for name in METRICS}
    answers = answer_facts(options.config, run)
    right = {name: sum(answer[f"{name} right"] for answer in answers) for name in ("teacher", "student")}
    write_json(options.json, answers, vars(options) | costs | {"right": right, "history": history})
    if costs:
        print(f"{costs['minutes']:.1f} minutes, {costs['cpu_minutes']:.1f} of CPU, {costs['peak_gb']:.2f} GB at most\n")
    rows = [[name, f"{values[0]:.3f}", f"{values[-1]:.3f}"] for name, values in history.items()]
    print(table(["metric", "before", "after"], rows, options.markdown), end="\n\n")
    lines = [[answer["prompt"], answer["teacher"], mark(answer) + answer["student"]] for answer in answers]
    print(table(["prompt", "teacher", "student"], lines, options.markdown), end="\n\n")
    print(f"Right: teacher {right['teacher']}, student {right['student']} of {len(answers)}.")


def trained(config: Path, run: Path) -> dict[str, float]:
    """Trains by the command, as a user does; its minutes and its peak memory."""
    Student(source_of(config)).prepare()  # the download is not counted
    start = time.perf_counter()
    command = [sys.executable, "-m", "distillkit", "fit", "--config", str(config), "--overwrite=true"]
    subprocess.run([*command, f"--trainer.default_root_dir={run}"], check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "minutes": (time.perf_counter() - start) / 60,
        "cpu_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def answer_facts(config: Path, run: Path) -> list[dict[str, Any]]:
    """The facts, with both models' answers."""
    transformers.utils.logging.disable_progress_bar()
    facts = [json.loads(line) for line in FACTS.read_text().splitlines()]
    system = yaml.safe_load(config.read_text())["data"]["system"]
    teacher = Student(source_of(config), dtype="bfloat16")
    student = AutoModelForCausalLM.from_pretrained(run / EXPORT, dtype=torch.bfloat16)
    answers = {
        "teacher": generated(teacher.load_base(), teacher.tokenizer(), facts, system),
        "student": generated(student, AutoTokenizer.from_pretrained(run / EXPORT), facts, system),
    }
    for name, texts in answers.items():
        for fact, text in zip(facts, texts, strict=True):
            fact |= {name: text, f"{name} right": is_right(text, fact["answer"])}
    return facts


def source_of(config: Path) -> str:
    """The student's source in a configuration."""
    return str(yaml.safe_load(config.read_text())["model"]["student"]["source"])


@torch.no_grad()
def generated(model: Any, tokenizer: Any, facts: Sequence[dict[str, Any]], system: str) -> list[str]:
    """Greedy answers, by transformers' own `generate`."""
    texts = []
    for fact in facts:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": fact["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.eval().generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def is_right(text: str, answer: str) -> bool:
    """True if a word of the text begins with the answer, in any case; a single letter must be a word, in capitals."""
    if len(answer) == 1:
        return re.search(rf"\b{answer}\b", text) is not None
    return re.search(rf"\b{re.escape(answer)}", text, re.IGNORECASE) is not None


def mark(answer: dict[str, Any]) -> str:
    """The sign before a student's answer: right or wrong."""
    return "✓ " if answer["student right"] else "✗ "


if __name__ == "__main__":
    main()

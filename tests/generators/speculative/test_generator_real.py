"""The real 135M model as teacher, and itself without two of its layers as the student that drafts."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from distillkit.curators.speculative import SpeculativeCurator
from distillkit.data.collate import collate
from distillkit.evaluation.heldout import HeldOut
from distillkit.generators.transformers import TransformersGenerator
from distillkit.models.heads import logits_width
from distillkit.models.scoring import score
from distillkit.models.student import Student
from distillkit.types import Prompt, Prompts, Sampling
from helpers.pairs import pair

CONFIGS = Path(__file__).parents[3] / "configs"
PLAIN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    """Teacher, student, tokenizer and eight held-out prompts."""
    source = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["student"]["source"]
    teacher, tokenizer = Student(source).load().eval(), Student(source).tokenizer()
    layers = [layer for layer in range(30) if layer not in (12, 18)]
    student = Student(source, keep_layers=layers).load().eval()
    lines = (CONFIGS / "prompts" / "quickstart-heldout.jsonl").read_text().splitlines()[:8]
    asked = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    ids = [tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=False) for own in asked]
    return teacher, student, tokenizer, Prompts(tuple(Prompt(f"p{i}", (), tuple(own)) for i, own in enumerate(ids)))


def written(real, sampling, **settings):
    """The curator's rows and how its drafts fared."""
    teacher, student, tokenizer, prompts = real
    curator = SpeculativeCurator(sampling=sampling, progress=False, **settings)
    generator = curator.own_generators()["speculative"]
    generator.refresh(pair(student, teacher), tokenizer)
    return curator.curate(prompts, {"speculative": generator}), generator.acceptance


def test_the_rate_of_acceptance_is_what_held_out_evaluation_expects_of_the_same_text(real):
    teacher, student, tokenizer, _ = real
    rows, counts = written(real, PLAIN, block=4)
    batch, held_out, width = collate(rows, pad_id=tokenizer.pad_token_id), HeldOut(), logits_width(teacher)
    with torch.no_grad():
        held_out.update(score(student, batch, width), score(teacher, batch, width), batch)
    expected = float(held_out.compute()["acceptance"])
    print(
        f"accepted {counts.rate:.3f} of {counts.judged}, expected {expected:.3f}; {counts.tokens_per_check:.2f} a pass"
    )
    assert abs(counts.rate - expected) < 4 * math.sqrt(expected * (1 - expected) / counts.judged)
    assert counts.tokens_per_check > 1.5


def test_greedy_exact_text_is_the_teachers(real):
    teacher, _, tokenizer, prompts = real
    greedy = Sampling(temperature=0.0, max_new_tokens=24)
    alone = TransformersGenerator(progress=False)
    alone.refresh(teacher, tokenizer)
    rows, counts = written(real, greedy)
    print(f"accepted {counts.rate:.3f} of {counts.judged}; {counts.tokens_per_check:.2f} a pass")
    expected = [
        prompt.input_ids + own.token_ids for prompt, own in zip(prompts, alone.generate(prompts, greedy), strict=True)
    ]
    assert [row.input_ids for row in rows] == expected
    assert counts.tokens_per_check > 1.5

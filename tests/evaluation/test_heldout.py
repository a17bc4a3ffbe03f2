import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distillkit.data.collate import collate
from distillkit.errors import ConfigError
from distillkit.evaluation import heldout
from distillkit.evaluation.heldout import Answer, HeldOut
from distillkit.interfaces import Generator
from distillkit.losses import CrossEntropy, ForwardKL
from distillkit.types import Prompt, Prompts, Response, Row, Sampling, Scores
from distillkit.verifiers.length import TargetLength
from helpers.gloo import run_ranks

VOCAB = 17


def some_batch(lengths, seed=0):
    """Rows with responses of these lengths after one token, and `[N, V]` logits of teacher and student."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        Row((0, *torch.randint(VOCAB, (n,), generator=generator).tolist()), (False, *[True] * n), "teacher", f"p{i}")
        for i, n in enumerate(lengths)
    ]
    logits = [3.0 * torch.randn(sum(lengths), VOCAB, generator=generator) for _ in range(2)]
    return collate(rows, pad_id=0), *logits


def by_hand(parts):
    """Figures over all positions of all batches, in float64 on whole probabilities."""
    kl, nll, acceptance = [], [], []
    for batch, *logits in parts:
        p, q = (np.exp(own.double().numpy()) for own in logits)
        p, q = (own / own.sum(-1, keepdims=True) for own in (p, q))
        for t, target in enumerate(batch.targets.tolist()):
            kl.append(sum(p[t, v] * math.log(p[t, v] / q[t, v]) for v in range(VOCAB)))
            nll.append(-math.log(q[t, target]))
            acceptance.append(sum(min(p[t, v], q[t, v]) for v in range(VOCAB)))
    return {"kl": np.mean(kl), "nll": np.mean(nll), "acceptance": np.mean(acceptance)}


class Scripted(Generator):
    def __init__(self, *texts):
        self.texts = texts

    def refresh(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling):
        return [Response(prompt.id, (1,), self.texts[int(prompt.id)], "stop") for prompt in prompts]


def questions(count):
    return Prompts(tuple(Prompt(str(i), ({"role": "user", "content": f"Question {i}"},), (2,)) for i in range(count)))


def counted(parts, answers=("yes",), references=("yes",)):
    held_out = HeldOut()
    for batch, teacher, student in parts:
        teacher_scores = None if teacher is None else Scores.from_logits(teacher)
        held_out.update(Scores.from_logits(student), teacher_scores, batch)
    held_out.answer(Scripted(*answers), questions(len(references)), references, Sampling(temperature=0.0))
    return held_out


@pytest.mark.parametrize("budget", [2**28, 4 * VOCAB * 8 * 3], ids=["whole", "three at a time"])
def test_figures_are_means_over_all_positions(budget, monkeypatch):
    monkeypatch.setattr(heldout, "default_budget", lambda _: budget)
    parts = [some_batch((5, 2)), some_batch((1, 0, 7), seed=1)]
    found = counted(parts).compute()
    expected = by_hand(parts)
    assert {name: float(found[name]) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_equal_models_have_no_divergence_and_full_acceptance():
    batch, logits, _ = some_batch((4, 3))
    found = counted([(batch, logits, logits)]).compute()
    assert float(found["kl"]) == pytest.approx(0.0, abs=1e-7)
    assert float(found["acceptance"]) == pytest.approx(1.0, abs=1e-6)


def test_without_a_teacher_there_are_likelihood_and_answers_alone():
    batch, _, student = some_batch((4, 3))
    assert counted([(batch, None, student)]).compute().keys() == {"nll", "rouge_l"}


def test_a_batch_without_positions_changes_no_figure():
    parts = [some_batch((5, 2))]
    with_empty = counted([*parts, some_batch((0, 0))]).compute()
    assert with_empty == counted(parts).compute()


def test_a_nan_shows():
    batch, teacher, student = some_batch((5,))
    student[2] = math.nan
    found = counted([(batch, teacher, student)]).compute()
    assert all(math.isnan(found[name]) for name in ("kl", "nll", "acceptance"))


def test_figures_start_anew_after_each_computation():
    parts, others = [some_batch((5, 2))], [some_batch((3,), seed=2)]
    held_out = counted(parts)
    held_out.compute()
    for batch, teacher, student in others:
        held_out.update(Scores.from_logits(student), Scores.from_logits(teacher), batch)
    held_out.answer(Scripted("no"), questions(1), ["yes"], Sampling())
    assert held_out.compute() == counted(others, ("no",), ("yes",)).compute()


# The longest common subsequence, counted by hand: its share of the reference, of the answer, and their harmonic mean.
ROUGE_L = [
    ("the cat sat on the mat", "the cat lay on a mat", 4 / 6),  # the cat on mat: 4 of 6 and 4 of 6
    ("a b c", "a c", 2 * (2 / 3 * 1) / (2 / 3 + 1)),  # a c: 2 of 3 and 2 of 2
    ("Paris.", "It is Paris", 2 * (1 * 1 / 3) / (1 + 1 / 3)),  # case and stops don't count
    ("b a", "a b", 1 / 2),  # order does: one of the two
    ("none of these", "quite another text", 0.0),
    ("", "something", 0.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE_L)
def test_rouge_l_is_that_of_the_longest_common_subsequence(answer, reference, expected):
    found = counted([some_batch((2,))], (answer,), (reference,)).compute()["rouge_l"]
    assert float(found) == pytest.approx(100 * expected)


def test_rouge_l_is_a_mean_over_answers():
    answers, references, scores = zip(*ROUGE_L, strict=True)
    found = counted([some_batch((2,))], answers, references).compute()["rouge_l"]
    assert float(found) == pytest.approx(100 * np.mean(scores))


def test_the_table_holds_the_last_turn_asked_and_both_answers():
    held_out = HeldOut()
    first, second = questions(2)
    told = Prompt("0", ({"role": "system", "content": "Be brief."}, *first.messages), (2,))
    held_out.answer(Scripted("A", "B"), Prompts((told, second)), ["a", "b"], Sampling())
    earlier = [{"role": "system", "content": "Be brief."}]
    expected = [
        Answer("Question 0", "a", "A", "0", "stop", 1, earlier=earlier),
        Answer("Question 1", "b", "B", "1", "stop", 1),
    ]
    assert [replace(row, metrics={}) for row in held_out.table] == expected


def test_each_prompt_has_the_figures_of_its_own_positions():
    (batch, teacher, student), lengths = some_batch((5, 0, 2)), (5, 0, 2)
    held_out = HeldOut({"brief": TargetLength(3)})
    held_out.update(Scores.from_logits(student), Scores.from_logits(teacher), batch)
    held_out.answer(Scripted("a", "b", "c", "d"), questions(4), ["a", "b", "x", "d"], Sampling())
    found = held_out.table
    assert [row.positions for row in found] == [*lengths, 0], "the last prompt was not scored"
    for row, start in ((0, 0), (2, 5)):
        part = slice(start, start + lengths[row])
        own = by_hand([(replace(batch, targets=batch.targets[part]), teacher[part], student[part])])
        assert {name: found[row].metrics[name] for name in own} == pytest.approx(own, rel=1e-5)
    assert [row.metrics.keys() & {"kl"} for row in found] == [{"kl"}, set(), {"kl"}, set()]
    assert [row.metrics["rouge_l"] for row in found] == pytest.approx([100, 100, 0, 100])
    assert [row.metrics["brief"] for row in found] == [-2.0] * 4
    assert float(held_out.compute()["brief"]) == -2.0


@pytest.mark.parametrize("name", ["kl", "rouge_l", "step", "a.b", "a b", ""])
def test_a_verifier_can_not_have_the_name_of_another_figure(name):
    with pytest.raises(ConfigError, match=r"model\.metrics can't have the name"):
        HeldOut({name: TargetLength()})


def test_names_of_python_are_names():
    held_out = HeldOut({"keys": TargetLength()})
    held_out.answer(Scripted("a"), questions(1), ["a"], Sampling())
    assert [row.metrics["keys"] for row in held_out.table] == [-1.0]


def test_ranks_with_different_numbers_of_positions_and_answers_agree(tmp_path):
    # Rank 0 has everything, as where there are fewer held-out prompts than ranks.
    script = """
import torch
from distillkit.data.collate import collate
from distillkit.evaluation.heldout import HeldOut
from distillkit.interfaces import Generator
from distillkit.losses import CrossEntropy, ForwardKL
from distillkit.types import Prompt, Prompts, Response, Row, Sampling, Scores

class Same(Generator):
    def refresh(self, model, tokenizer): pass
    def generate(self, prompts, sampling): return [Response(p.id, (1,), p.id, "stop") for p in prompts]

size = 3 if rank == 0 else 0
held_out = HeldOut()
batch = collate([Row((0, 1, 1, 1), (False, *[size > 0] * 3), "teacher", "a")], pad_id=0)
p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
held_out.update(Scores.from_logits(q.expand(size, 2)), Scores.from_logits(p.expand(size, 2)), batch)
prompts = Prompts(tuple(Prompt(name, ({"role": "user", "content": "?"},), (1,)) for name in ("a b", "c", "d")))[:size]
held_out.answer(Same(), prompts, ["a b", "c", "x"][:size], Sampling())
found = {name: float(value) for name, value in held_out.compute().items()}
"""
    first, second = run_ranks(script, tmp_path)
    assert first == second
    expected = {"kl": 0.5 * math.log(4 / 3), "nll": -math.log(0.75), "acceptance": 0.75, "rouge_l": 200 / 3}
    assert first == pytest.approx(expected, rel=1e-6)


def gold_batch():
    """Three prompts with a reference of the teacher's each; the first and the last have an answer of the data too."""
    groups = [(("teacher", 5), ("dataset", 3)), (("teacher", 2),), (("teacher", 4), ("dataset", 1))]
    generator = torch.Generator().manual_seed(3)
    rows = [
        Row((0, *torch.randint(VOCAB, (n,), generator=generator).tolist()), (False, *[True] * n), writer, f"p{i}")
        for i, group in enumerate(groups)
        for writer, n in group
    ]
    logits = [3.0 * torch.randn(15, VOCAB, generator=generator) for _ in range(2)]
    return collate(rows, pad_id=0), *logits


REFERENCE, GOLD = [*range(5), 8, 9, *range(10, 14)], [5, 6, 7, 14]
"""Positions of the teacher's responses and of the data's answers."""


def with_gold():
    """Held-out metrics after `gold_batch` and the answers to its prompts."""
    held_out = HeldOut()
    held_out.expect_gold(True)
    batch, teacher, student = gold_batch()
    held_out.update(Scores.from_logits(student), Scores.from_logits(teacher), batch, ForwardKL())
    golds = ["yes", None, "no way"]
    prompts = [replace(prompt, reference=gold) for prompt, gold in zip(questions(3), golds, strict=True)]
    held_out.answer(Scripted("yes", "no", "no"), Prompts(tuple(prompts)), ["no", "no", "no"], Sampling())
    return held_out


def test_the_datas_answers_are_measured_beside_the_teachers():
    batch, teacher, student = gold_batch()
    found = {name: float(value) for name, value in with_gold().compute().items()}
    reference = (replace(batch, targets=batch.targets[REFERENCE]), teacher[REFERENCE], student[REFERENCE])
    gold = by_hand([(replace(batch, targets=batch.targets[GOLD]), teacher[GOLD], student[GOLD])])
    assert {name: found[name] for name in ("kl", "nll", "acceptance")} == pytest.approx(by_hand([reference]), rel=1e-5)
    assert found["gold_nll"] == pytest.approx(gold["nll"], rel=1e-5)
    assert found["rouge_l"] == pytest.approx(200 / 3)
    assert found["gold_rouge_l"] == pytest.approx((100 + 200 / 3) / 2), "one of two prompts, and two of three words"
    first, last = (
        by_hand([(replace(batch, targets=batch.targets[part]), teacher[part], student[part])])
        for part in (GOLD[:3], GOLD[3:])
    )
    assert found["loss"] == pytest.approx((first["kl"] + last["kl"]) / 2, rel=1e-5), "a mean over the two answers"


def test_each_prompt_has_the_metrics_of_the_datas_answer():
    rows = with_gold().table
    assert [(row.gold, row.gold_positions, row.positions) for row in rows] == [
        ("yes", 3, 5),
        ("", 0, 2),
        ("no way", 1, 4),
    ]
    assert ["gold_nll" in row.metrics for row in rows] == [True, False, True]
    assert [row.metrics.get("gold_rouge_l") for row in rows] == [100.0, None, pytest.approx(200 / 3)]


def test_a_loss_that_counts_no_answer_of_the_data_has_no_value():
    class StudentOnly(CrossEntropy):
        def units(self, batch):
            return torch.zeros((), dtype=torch.float64)

    batch, _, student = some_batch((4, 3))
    held_out = HeldOut()
    held_out.update(Scores.from_logits(student), None, batch, StudentOnly())
    assert "loss" not in held_out.compute()
    held_out.update(Scores.from_logits(student), None, batch, CrossEntropy(reduction="token_mean"))
    metrics = held_out.compute()
    assert float(metrics["loss"]) == pytest.approx(float(metrics["nll"]), rel=1e-6)

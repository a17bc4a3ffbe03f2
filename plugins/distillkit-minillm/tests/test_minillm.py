import copy
import itertools
import math

import pytest
import torch
from distillkit_minillm.loss import MiniLLM
from distillkit_minillm.mixture import MixtureCurator, MixtureGenerator
from torch import nn

from distillkit import registry
from distillkit.data import collate
from distillkit.errors import ConfigError
from distillkit.testing import GeneratorContract, check_generator, check_loss, make_batch, tiny_model, tiny_tokenizer
from distillkit.types import Row, Sampling, Scores

VOCAB = 3
SHARPNESS = 6


@pytest.mark.parametrize("writers", [("mixture", "dataset"), ("mixture",), ("teacher", "student")])
def test_it_keeps_the_contract_of_a_loss(writers):
    # The gradient is that of an expectation, not of the value.
    check_loss(MiniLLM(), exact_gradient=False, writers=writers)


def gradient(loss, logits, teacher, batch):
    leaf = logits.clone().requires_grad_()
    output = loss(Scores.from_logits(leaf), Scores.from_logits(teacher), batch)
    return output, torch.autograd.grad(output.total.sum(), leaf)[0]


def by_formula(student, teacher, batch, share):
    """The gradient by the logits, position by position with plain autograd."""
    leaf = student.clone().requires_grad_()
    logq, logp = leaf.log_softmax(-1), teacher.log_softmax(-1)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length, writer in zip(batch.lengths, batch.writer, strict=True):
        rows = range(start, start + length)
        pairs = [(logp[t, batch.targets[t]].item(), logq[t, batch.targets[t]].item()) for t in rows]
        for index, t in enumerate(rows):
            target_logq = logq[t, batch.targets[t]]
            if writer == "dataset":
                total = total - target_logq
                continue
            p, q = (math.exp(value) for value in pairs[index])
            weight = q / (share * p + (1 - share) * q)
            later = [p - q for p, q in pairs[index + 1 :]]
            mean = sum(later) / len(later) if later else 0.0
            total = total + weight * (logq[t].exp() * (logq[t] - logp[t])).sum() - weight * mean * target_logq
        start += length
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_its_gradient_is_that_of_the_formula(share):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = make_batch((4, 2, 0, 3), ("mixture", "dataset", "mixture", "mixture"), (0, 0, 1, 2), 7)
    output, grad = gradient(MiniLLM(share), student, teacher, batch)
    torch.testing.assert_close(grad, by_formula(student, teacher, batch, share), rtol=1e-10, atol=1e-12)
    assert output.units.tolist() == [7, 2]


def sequence_kl(student, teacher):
    """KL(q‖p) of whole responses of two tokens; the second's distribution depends on the first."""
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(range(VOCAB), repeat=2):
        q = logq[0, first] + logq[1 + first, second]
        p = logp[0, first] + logp[1 + first, second]
        total = total + q.exp() * (q - p)
    return total


def mean_gradient(student, teacher, share):
    """Mean of the loss's gradient over all responses of two tokens, drawn from the mixture."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    mixture = share * p + (1 - share) * q
    total = torch.zeros_like(student)
    for first, second in itertools.product(range(VOCAB), repeat=2):
        batch = collate([Row((0, first, second), (False, True, True), "mixture", "p")], pad_id=0)
        rows = [0, 1 + first]
        _, grad = gradient(MiniLLM(share), student[rows], teacher[rows], batch)
        total[rows] += mixture[0, first] * mixture[1 + first, second] * grad
    return total


def test_its_mean_over_all_responses_is_the_gradient_of_the_reverse_kl_of_whole_responses():
    # With two tokens one follows the first, so that the length normalisation divides by 1.
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(1 + VOCAB, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = student.clone().requires_grad_()
    (exact,) = torch.autograd.grad(sequence_kl(leaf, teacher), leaf)
    torch.testing.assert_close(mean_gradient(student, teacher, 0.0), exact, rtol=1e-10, atol=1e-12)


def test_with_a_mixture_the_first_tokens_gradient_is_exact_and_the_weights_are_those_of_one_token():
    # w_t is the ratio at position t alone (equation 6): what is left out are the ratios of the other tokens.
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(1 + VOCAB, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[1:] = student[1:]  # equal there: no return follows the first token, no ratio of the second differs from 1
    leaf = student.clone().requires_grad_()
    (exact,) = torch.autograd.grad(sequence_kl(leaf, teacher), leaf)
    torch.testing.assert_close(mean_gradient(student, teacher, 0.3)[0], exact[0], rtol=1e-10, atol=1e-12)


def test_a_worked_response():
    # Two tokens 0 0; q = (½, ½) twice, p = (¼, ¾) and (⅛, ⅞); α = 0, so that w = 1. The first's return is log ¼.
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75], [0.125, 0.875]], dtype=torch.float64).log()
    batch = collate([Row((1, 0, 0), (False, True, True), "mixture", "p")], pad_id=0)
    output, grad = gradient(MiniLLM(0.0), student, teacher, batch)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.5 * math.log(0.5 / 0.125) + 0.5 * math.log(0.5 / 0.875)
    assert output.total.tolist() == pytest.approx([first + second, 0.0])
    assert output.metrics["return"].tolist() == pytest.approx([math.log(0.25), 0.0])
    # Single step: q_0 q_1 log((q_0/p_0)/(q_1/p_1)) = ¼ log 3; long: −log ¼ · (1 − ½).
    assert grad[0].tolist() == pytest.approx(
        [0.25 * math.log(3) - 0.5 * math.log(0.25)] * 1 + [-0.25 * math.log(3) + 0.5 * math.log(0.25)]
    )
    assert grad[1].tolist() == pytest.approx([0.25 * math.log(7), -0.25 * math.log(7)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_share": 1.0}, r"MiniLLM\.teacher_share must"),
        ({"language_model": -1.0}, r"MiniLLM\.language_model must be at least 0, got -1\.0"),
    ],
)
def test_a_number_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MiniLLM(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"MixtureGenerator\.batch_size must be at least 1, got 0"),
        ({"teacher_share": -0.1}, r"MixtureGenerator\.teacher_share must"),
    ],
)
def test_a_mixture_that_is_none_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MixtureCurator(**settings)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_generator_keeps_its_contract(share):
    check_generator(lambda: MixtureGenerator(share, batch_size=2))


def draws(share, count):
    """First tokens of one prompt under many seeds, and both models' distributions of it."""
    tokenizer = tiny_tokenizer()
    models = nn.ModuleDict(
        {
            "student": tiny_model(len(tokenizer), seed=1),
            "teacher": tiny_model(len(tokenizer), seed=2),
        }
    )
    for model in models.values():
        model.get_output_embeddings().weight.data *= SHARPNESS  # far from uniform
    generator = MixtureGenerator(share, batch_size=64)
    generator.refresh(models, tokenizer)
    prompts = GeneratorContract().prompts()[:1]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1)
    counts = torch.zeros(len(tokenizer))
    for round_index in range(count):
        (response,) = generator.generate(prompts.at_round(round_index), sampling)
        counts[response.token_ids[0]] += 1
    ids = torch.tensor([prompts[0].input_ids])
    with torch.no_grad():
        p, q = (models[name](ids).logits[0, -1, : len(tokenizer)].softmax(-1) for name in ("teacher", "student"))
    return counts, p, q


def distance(counts, expected):
    """Mean square of the standardised differences over tokens that are expected 5 times at least: about 1."""
    often = expected * counts.sum() >= 5
    expected = expected[often] * counts.sum()
    return float(((counts[often] - expected) ** 2 / expected).mean())


def test_tokens_are_drawn_from_the_mixture_and_from_no_other():
    counts, p, q = draws(0.3, 1500)
    assert distance(counts, 0.3 * p + 0.7 * q) < 2
    assert distance(counts, q) > 4
    assert distance(counts, 0.7 * p + 0.3 * q) > 4


def test_the_curator_names_its_writer_and_is_found_by_its_name():
    curator = MixtureCurator()
    assert curator.writers == {"mixture"}
    assert curator.rounds == "step" or curator.rounds == 1
    assert curator.sampling == Sampling(temperature=1.0, top_p=1.0)
    assert registry.get("loss", "MiniLLM") is MiniLLM
    assert registry.get("curator", "MixtureCurator") is MixtureCurator
    assert registry.get("generator", "MixtureGenerator") is MixtureGenerator
    assert copy.deepcopy(MiniLLM()).teacher_share == 0.2

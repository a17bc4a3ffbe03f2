"""The generator in process writes on the device what it writes on the CPU."""

import copy
from typing import Any

import pytest
import torch

from distillkit.generators.transformers import TransformersGenerator
from distillkit.types import Prompts, Response, Sampling
from gpu.small import qwen2
from helpers.models import tiny_tokenizer
from helpers.pairs import prompts_of

pytestmark = pytest.mark.gpu

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
LENGTHS = (3, 11, 1, 7, 7, 2, 16, 25, 4, 9, 30, 5)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
SAMPLINGS = {
    "top-p": Sampling(temperature=0.8, top_p=0.95, max_new_tokens=12, seed=3),
    "all tokens": Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=4),
    "top-k": Sampling(temperature=1.3, top_p=0.9, top_k=20, max_new_tokens=12, seed=5),
}


def model_of(window: int | None = None) -> Any:
    """A model for which every twelfth token ends a turn."""
    model = qwen2(layers=3, window=window, vocab=VOCAB)
    model.generation_config.eos_token_id = list(range(1, VOCAB, 12))
    return model


def write(model: Any, prompts: Prompts, sampling: Sampling, **settings: Any) -> list[Response]:
    generator = TransformersGenerator(**{"progress": False, "batch_size": 5} | settings)
    generator.refresh(model, TOKENIZER)
    return generator.generate(prompts, sampling)


def assert_written_alike(ours: list[Response], theirs: list[Response], exceptions: int = 0) -> None:
    """All responses are equal, or all but so many; log-probabilities agree where the tokens do."""
    assert len(ours) == len(theirs) == len(LENGTHS)
    same = [(one, other) for one, other in zip(ours, theirs, strict=True) if one == other]
    assert len(same) >= len(theirs) - exceptions
    for one, other in same:
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_greedy_tokens_are_those_of_the_cpu(window: int | None, device: torch.device) -> None:
    model, prompts = model_of(window), prompts_of(VOCAB, LENGTHS)
    expected = write(model, prompts, GREEDY)
    assert len({len(response.token_ids) for response in expected}) > 2, "some end early"
    assert {response.finish for response in expected} == {"stop", "length"}
    assert_written_alike(write(copy.deepcopy(model).to(device), prompts, GREEDY), expected)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_sampled_responses_are_those_of_the_cpu(sampling: Sampling, device: torch.device) -> None:
    # The uniform numbers are drawn on the CPU. A token differs where one falls within rounding, 1e-6, of the edge
    # between two tokens, or a token's mass within rounding of top-p: 144 tokens in all, so that one response in
    # twelve may differ, and two may not.
    model, prompts = model_of(), prompts_of(VOCAB, LENGTHS)
    expected = write(model, prompts, sampling)
    assert len({response.token_ids for response in expected}) == len(LENGTHS)
    actual = write(copy.deepcopy(model).to(device), prompts, sampling)
    assert_written_alike(actual, expected, exceptions=1)


def test_a_response_depends_on_neither_batch_size_nor_neighbours(device: torch.device) -> None:
    model, sampling, prompts = model_of().to(device), SAMPLINGS["top-p"], prompts_of(VOCAB, LENGTHS)
    alone = [write(model, prompts[index : index + 1], sampling)[0] for index in range(len(prompts))]
    for batch_size in (3, 12):
        assert_written_alike(write(model, prompts, sampling, batch_size=batch_size), alone, exceptions=1)


def test_the_random_states_are_neither_read_nor_moved(device: torch.device) -> None:
    model, prompts = model_of().to(device), prompts_of(VOCAB, LENGTHS)
    before = torch.get_rng_state(), None if device.type == "cpu" else torch.cuda.get_rng_state(device)
    first = write(model, prompts, SAMPLINGS["top-p"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert before[1] is None or torch.equal(torch.cuda.get_rng_state(device), before[1])
    torch.manual_seed(99)
    assert write(model, prompts, SAMPLINGS["top-p"]) == first


def test_a_copy_in_bfloat16_writes_where_it_is_asked_for(device: torch.device) -> None:
    model, prompts = model_of().to(device), prompts_of(VOCAB, LENGTHS)
    responses = write(model, prompts, SAMPLINGS["top-p"], dtype="bfloat16")
    assert all(0 < len(response.token_ids) <= 12 for response in responses)
    for response in responses:
        assert all(-30 < value <= 1e-6 for value in response.log_probs)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from distillkit.errors import ConfigError
from distillkit.generators import transformers as in_process
from distillkit.generators.transformers import TransformersGenerator
from distillkit.types import Prompt, Prompts, Sampling
from helpers.models import END_ID, GAPPED_END_ID, gapped_tokenizer, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12, seed=3)
LENGTHS = (3, 11, 1, 7, 7, 2, 16)


def some_prompts(lengths=LENGTHS, round_index=0):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    items = [Prompt(f"p{i}", ({"role": "user", "content": str(i)},), tuple(row)) for i, row in enumerate(rows)]
    return Prompts(tuple(items), round_index)


def ready(model, **settings):
    generator = TransformersGenerator(**{"progress": False} | settings)
    generator.refresh(model, TOKENIZER)
    return generator


def tokens_of(responses):
    return [response.token_ids for response in responses]


def gemma2(**config):
    """A random Gemma 2 whose every other layer sees four tokens back."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": None,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(Gemma2Config(**settings)).eval()


def ending_often(model, share=4):
    """The model with every `share`-th token as an end of turn."""
    model.generation_config.eos_token_id = list(range(1, VOCAB, share))
    return model


def transformers_greedy(model, prompt, sampling=GREEDY):
    ids = torch.tensor([prompt.input_ids])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=END_ID,
    )
    return tuple(found[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("make", [lambda: tiny_model(VOCAB), gemma2], ids=["llama", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(make, batch_size):
    model = ending_often(make(), share=12)
    expected = [transformers_greedy(model, prompt) for prompt in some_prompts()]
    assert len({len(tokens) for tokens in expected}) > 1  # some end early
    assert tokens_of(ready(model, batch_size=batch_size).generate(some_prompts(), GREEDY)) == expected


@pytest.mark.parametrize("batch_size", [2, 4, 7])
def test_a_response_depends_on_neither_batch_size_nor_neighbours(batch_size):
    model = ending_often(tiny_model(VOCAB), share=12)
    prompts = some_prompts()
    alone = [ready(model).generate(prompts[place : place + 1], WARM)[0] for place in range(len(prompts))]
    assert ready(model, batch_size=batch_size).generate(prompts, WARM) == alone
    backwards = Prompts(tuple(reversed(prompts.items)))
    assert ready(model, batch_size=batch_size).generate(backwards, WARM) == alone[::-1]


def test_log_probabilities_are_the_models_own_whatever_the_sampling():
    model = ending_often(tiny_model(VOCAB + 30), share=12)
    prompts, sampling = some_prompts(), Sampling(temperature=0.6, top_p=0.8, top_k=20, max_new_tokens=12)
    for prompt, response in zip(prompts, ready(model, batch_size=3).generate(prompts, sampling), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.input_ids, *response.token_ids]])).logits[0, :, :VOCAB].double()
        said = logits.log_softmax(-1)[len(prompt.input_ids) - 1 : -1]
        expected = said.gather(-1, torch.tensor(response.token_ids)[:, None]).squeeze(-1)
        assert len(response.log_probs) == len(response.token_ids)
        torch.testing.assert_close(torch.tensor(response.log_probs).double(), expected, rtol=0, atol=1e-5)


def test_the_seed_and_the_round_change_what_is_drawn():
    generator = ready(tiny_model(VOCAB))
    first = tokens_of(generator.generate(some_prompts(), WARM))
    assert tokens_of(generator.generate(some_prompts(), WARM)) == first
    assert tokens_of(generator.generate(some_prompts(round_index=1), WARM)) != first
    assert tokens_of(generator.generate(some_prompts(), Sampling(1.0, 0.95, 0, 12, seed=4))) != first


def test_the_global_random_state_is_neither_read_nor_moved():
    generator = ready(tiny_model(VOCAB))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before, first = torch.get_rng_state(), generator.generate(some_prompts(), WARM)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert generator.generate(some_prompts(), WARM) == first


def test_the_first_token_follows_the_models_distribution():
    model, sampling = tiny_model(VOCAB), Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1)
    prompt = some_prompts((5,))[0]
    copies = Prompts(tuple(Prompt(str(i), prompt.messages, prompt.input_ids) for i in range(2000)))
    found = torch.tensor(tokens_of(ready(model, batch_size=500).generate(copies, sampling))).flatten()
    with torch.no_grad():
        probs = model(torch.tensor([prompt.input_ids])).logits[0, -1].softmax(-1)
    top, token = probs.max(-1)
    share = (found == token).float().mean()
    assert abs(share - top) < 4 * (top * (1 - top) / 2000).sqrt()  # four standard deviations


def test_a_row_that_has_ended_leaves_its_batch():
    model = ending_often(tiny_model(VOCAB))
    generator, sizes = ready(model), []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    responses = generator.generate(some_prompts(), WARM)
    handle.remove()
    assert {response.finish for response in responses} == {"stop", "length"}
    lengths = [len(response.token_ids) for response in responses]
    # Step s is run by the rows that write at least s tokens, and by no others.
    assert sizes == [sum(length >= step for length in lengths) for step in range(1, max(lengths) + 1)]


def test_the_end_of_turn_is_the_last_token_and_only_there():
    model = ending_often(tiny_model(VOCAB))
    ends = set(model.generation_config.eos_token_id)
    for response in ready(model).generate(some_prompts(), WARM):
        assert not ends & set(response.token_ids[:-1])
        assert (response.finish == "stop") == (response.token_ids[-1] in ends)
        assert response.finish == "stop" or len(response.token_ids) == WARM.max_new_tokens


def test_a_response_cut_at_its_longest_finishes_by_length():
    sampling = Sampling(temperature=0.0, max_new_tokens=3)
    for response in ready(tiny_model(VOCAB)).generate(some_prompts(), sampling):
        assert (len(response.token_ids), response.finish) == (3, "length")


def test_the_text_is_decoded_without_special_tokens_and_the_end_of_turn():
    model = tiny_model(VOCAB)
    model.generation_config.eos_token_id = list(range(2, VOCAB, 8))
    responses = ready(model).generate(some_prompts(), WARM)
    assert any(response.finish == "stop" and response.token_ids[-1] != END_ID for response in responses)
    for response in responses:
        ids = response.token_ids[: len(response.token_ids) - (response.finish == "stop")]
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        # What was cut within a character ends before it.
        assert (
            response.text == (text if response.finish == "stop" else text.rstrip("\N{REPLACEMENT CHARACTER}")).strip()
        )


def test_tokens_that_the_tokenizer_lacks_are_never_written():
    model = tiny_model(VOCAB + 300)
    for response in ready(model).generate(some_prompts(), Sampling(temperature=5.0, top_p=1.0, max_new_tokens=12)):
        assert max(response.token_ids) < VOCAB


def test_no_prompts_give_no_responses():
    assert ready(tiny_model(VOCAB)).generate(Prompts(()), WARM) == []


def rounded(model, dtype=torch.bfloat16):
    """A copy whose parameters, not its rotary frequencies, have another type."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(dtype)
    return other


@pytest.fixture
def with_instructions(monkeypatch):
    """A processor that multiplies in half precision, whatever runs the tests."""
    monkeypatch.setattr(in_process, "fast_dtype", lambda dtype, device: dtype)


@pytest.mark.usefixtures("with_instructions")
def test_a_copy_of_another_type_leaves_the_models_own_weights_as_they_are():
    model = tiny_model(VOCAB)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = ready(model, dtype="bfloat16").generate(some_prompts(), GREEDY)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found == ready(rounded(model)).generate(some_prompts(), GREEDY)


@pytest.mark.usefixtures("with_instructions")
def test_a_copy_follows_the_weights_at_each_refresh_and_not_before():
    model, other = tiny_model(VOCAB), tiny_model(VOCAB, seed=1)
    old, new = (tokens_of(ready(rounded(m)).generate(some_prompts(), GREEDY)) for m in (model, other))
    assert old != new
    generator = ready(model, dtype="bfloat16")
    assert tokens_of(generator.generate(some_prompts(), GREEDY)) == old
    model.load_state_dict(other.state_dict())
    assert tokens_of(generator.generate(some_prompts(), GREEDY)) == old
    generator.refresh(model, TOKENIZER)
    assert tokens_of(generator.generate(some_prompts(), GREEDY)) == new


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_of_the_models_own_type_are_shared(dtype):
    model, other = tiny_model(VOCAB), tiny_model(VOCAB, seed=1)
    generator = ready(model, dtype=dtype)
    model.load_state_dict(other.state_dict())
    assert generator.generate(some_prompts(), GREEDY) == ready(other).generate(some_prompts(), GREEDY)


def test_a_processor_without_instructions_for_the_type_shares_the_models_weights(monkeypatch):
    monkeypatch.setattr(in_process, "fast_dtype", lambda dtype, device: torch.float32)
    model, other = tiny_model(VOCAB), tiny_model(VOCAB, seed=1)
    generator = ready(model, dtype="bfloat16")
    model.load_state_dict(other.state_dict())
    assert generator.generate(some_prompts(), GREEDY) == ready(other).generate(some_prompts(), GREEDY)


def test_each_submodule_gets_its_own_mode_back():
    model = tiny_model(VOCAB, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    found = ready(model).generate(some_prompts(), GREEDY)
    assert [module.training for module in model.modules()] == modes
    assert found == ready(tiny_model(VOCAB)).generate(some_prompts(), GREEDY)  # without dropout


def test_the_mode_comes_back_after_an_error_too():
    model = tiny_model(VOCAB).train()
    broken = Prompts((Prompt("p", (), (VOCAB + 5,)),))
    with pytest.raises(IndexError):
        ready(model).generate(broken, GREEDY)
    assert all(module.training for module in model.modules())


def test_generation_leaves_no_graph_and_no_gradient():
    model = tiny_model(VOCAB).train()
    ready(model).generate(some_prompts(), WARM)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_size_below_1_is_refused():
    with pytest.raises(ConfigError, match=r"TransformersGenerator\.batch_size must be at least 1, got 0"):
        TransformersGenerator(batch_size=0)


def test_an_end_token_beyond_a_gap_of_the_vocabulary_ends_a_response():
    tokenizer = gapped_tokenizer()
    model = tiny_model(336, eos_token_id=GAPPED_END_ID, tie_word_embeddings=False)
    with torch.no_grad():  # a model that only says the end
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(336).index_fill(0, torch.tensor(GAPPED_END_ID), 50.0))
    generator = TransformersGenerator(progress=False)
    generator.refresh(model, tokenizer)
    prompt = Prompt("a", ({"role": "user", "content": "Hello"},), tuple(tokenizer.encode("Hello")))
    for temperature in (0.0, 1.0):
        (response,) = generator.generate(Prompts((prompt,)), Sampling(temperature=temperature, max_new_tokens=5))
        assert (response.token_ids, response.finish) == ((GAPPED_END_ID,), "stop")

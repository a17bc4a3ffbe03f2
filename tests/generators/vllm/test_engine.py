"""vLLM's own engine on SmolLM2-135M, float32, beside transformers. Minutes, in an environment with vLLM."""

import logging
import random

import pytest
import torch
import yaml

from distillkit.data.encoding import encode_all
from distillkit.data.records import Source
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.generators.vllm.generator import SpeculativeDecoding, VLLMGenerator
from distillkit.models.student import Student
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompts, Sampling
from helpers.docs import ROOT
from helpers.models import tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]

QUICKSTART = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
SOURCE, LAYERS = (QUICKSTART["model"]["student"][name] for name in ("source", "keep_layers"))
TOKENIZER = Student(SOURCE).tokenizer
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
WARM = Sampling(temperature=0.8, top_p=0.9, top_k=40, max_new_tokens=16, seed=3)
SETTINGS = {"max_model_len": 256, "kv_cache": 0.25, "progress": False}


def some_prompts(tokenizer, model, count=12, round_index=0):
    file = ROOT / "configs" / "prompts" / "quickstart-heldout.jsonl"
    encoded, _ = encode_all(
        Source(str(file), limit=count).records(),
        tokenizer,
        eos_ids(tokenizer, model),
        chat=True,
        system=QUICKSTART["data"]["system"],
        max_length=2048,
        overlong="error",
    )
    return Prompts(tuple(encoded), round_index)


def in_process(model, tokenizer):
    generator = TransformersGenerator(progress=False)
    generator.refresh(model, tokenizer)
    return generator


def engine_of(model, tokenizer, **settings):
    generator = VLLMGenerator(**SETTINGS | settings)
    generator.refresh(model, tokenizer)
    return generator


def agreement(found, expected, model, prompts):
    """The share of `expected`'s tokens before the first difference; a difference must be one of rounding."""
    agreed = total = 0
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(theirs.token_ids))
        agreed, total = agreed + same, total + len(theirs.token_ids)
        torch.testing.assert_close(
            torch.tensor(ours.log_probs[:same]), torch.tensor(theirs.log_probs[:same]), rtol=0, atol=1e-3
        )
        if same < len(theirs.token_ids):
            ids = torch.tensor([[*prompt.input_ids, *theirs.token_ids[:same]]])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            gap = logits.max() - logits[[ours.token_ids[same], theirs.token_ids[same]]].min()
            assert float(gap) < 1e-3
    print(f"greedy agreement {agreed}/{total} = {agreed / total:.4f}")
    return agreed / total


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER()


@pytest.fixture(scope="module")
def whole(tokenizer):
    """SmolLM2-135M, and an engine that has it."""
    model = Student(SOURCE).load().eval().requires_grad_(False)
    # What a model's own settings must not do to what is drawn.
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=3.0)
    generator = engine_of(model, tokenizer)
    return model, generator


@pytest.fixture(scope="module")
def small(tokenizer):
    """A model of four of its layers, and an engine that has it; both beside `whole`."""
    model = Student(SOURCE, keep_layers=[0, 1, 28, 29]).load().eval().requires_grad_(False)
    model.resize_token_embeddings(len(tokenizer) + 64)
    period = tokenizer.encode(".", add_special_tokens=False)[0]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, period]
    generator = engine_of(model, tokenizer)
    return model, generator


def test_greedy_responses_and_log_probabilities_are_those_of_transformers(whole, tokenizer):
    model, generator = whole
    prompts = some_prompts(tokenizer, model)
    found, expected = generator.generate(prompts, GREEDY), in_process(model, tokenizer).generate(prompts, GREEDY)
    assert agreement(found, expected, model, prompts) >= 0.95
    assert {response.finish for response in found} == {"stop", "length"}
    same = [place for place in range(len(prompts)) if found[place].token_ids == expected[place].token_ids]
    assert [found[place] for place in same] == [expected[place] for place in same]


def test_new_weights_are_followed_and_the_old_ones_come_back_exactly(whole, tokenizer, caplog):
    model, generator = whole
    prompts, kept = some_prompts(tokenizer, model, 6), {k: v.clone() for k, v in model.state_dict().items()}
    before = generator.generate(prompts, GREEDY)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw))
    with caplog.at_level(logging.INFO, "distillkit.generators.vllm.generator"):
        generator.refresh(model, tokenizer)
        generator.refresh(model, tokenizer)
    assert len([record for record in caplog.records if "vLLM has the weights" in record.message]) == 1
    moved = generator.generate(prompts, GREEDY)
    assert moved != before
    assert agreement(moved, in_process(model, tokenizer).generate(prompts, GREEDY), model, prompts) >= 0.95
    model.load_state_dict(kept)
    generator.refresh(model, tokenizer)
    again = generator.generate(prompts, GREEDY)
    assert again == before
    assert [response.log_probs for response in again] == [response.log_probs for response in before]


def test_a_sampled_response_has_a_seed_of_its_own(whole, tokenizer):
    model, generator = whole
    prompts = some_prompts(tokenizer, model, 6)
    found = generator.generate(prompts, WARM)
    assert generator.generate(prompts, WARM) == found
    assert generator.generate(prompts[2:4], WARM) == found[2:4]
    assert generator.generate(prompts.at_round(1), WARM) != found


def test_nothing_global_is_moved(whole, tokenizer):
    model, generator = whole
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    generator.generate(some_prompts(tokenizer, model, 2), WARM)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads()) == before[1:]
    torch.set_num_threads(before[2] + 1)
    assert torch.get_num_threads() == before[2] + 1
    torch.set_num_threads(before[2])


def test_a_response_that_may_not_fit_is_refused(whole, tokenizer):
    model, generator = whole
    with pytest.raises(ConfigError, match=r"may have \d+ tokens, but VLLMGenerator.max_model_len is 256"):
        generator.generate(some_prompts(tokenizer, model, 1), Sampling(max_new_tokens=250))


def test_every_end_of_turn_ends_a_response_and_no_other_token_is_written_than_the_tokenizers(small, tokenizer):
    model, generator = small
    prompts = some_prompts(tokenizer, model)
    ends = set(eos_ids(tokenizer, model))
    hot = Sampling(temperature=2.0, top_p=1.0, max_new_tokens=16)
    for response in generator.generate(prompts, hot):
        assert max(response.token_ids) < len(tokenizer)
    found, expected = generator.generate(prompts, GREEDY), in_process(model, tokenizer).generate(prompts, GREEDY)
    assert agreement(found, expected, model, prompts) >= 0.95
    for response in found:
        assert not ends & set(response.token_ids[:-1])
        assert (response.finish == "stop") == (response.token_ids[-1] in ends)


def test_an_adapter_is_merged_and_leaves_the_model_as_it_is(small, tokenizer):
    base, generator = small
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, config).eval()
    try:
        prompts = some_prompts(tokenizer, base, 6)
        plain = generator.generate(prompts, GREEDY)
        generator.refresh(model, tokenizer)
        found = generator.generate(prompts, GREEDY)
        assert found != plain
        assert agreement(found, in_process(model, tokenizer).generate(prompts, GREEDY), model, prompts) >= 0.95
        assert any("lora" in name for name, _ in model.named_parameters())
    finally:
        model.unload()


def test_a_model_of_its_own_writes_without_a_model_of_the_run(tokenizer):
    generator = VLLMGenerator(source=SOURCE, **SETTINGS)
    with pytest.raises(ModelError, match=r"tokenizers of the run and .* differ"):
        generator.refresh(torch.nn.ModuleDict(), tiny_tokenizer())
    generator.refresh(torch.nn.ModuleDict(), tokenizer)
    model = Student(SOURCE).load().eval()
    prompts = some_prompts(tokenizer, model, 4)
    found = generator.generate(prompts, GREEDY)
    assert agreement(found, in_process(model, tokenizer).generate(prompts, GREEDY), model, prompts) >= 0.95


# N-grams last: vLLM 0.32 starts no engine on the CPU once their numba is in the process.
@pytest.mark.parametrize("kind", ["student", "n-grams"])
def test_drafts_leave_greedy_responses_as_they_are(kind, whole, tokenizer, tmp_path, caplog):
    model, generator = whole
    draft = None
    if kind == "student":
        draft = str(tmp_path / "draft")
        student = Student(SOURCE, keep_layers=LAYERS)
        student.load().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    drafting = engine_of(model, tokenizer, speculative=SpeculativeDecoding(num_tokens=3, draft=draft))
    prompts = some_prompts(tokenizer, model, 6)
    with caplog.at_level(logging.INFO, "distillkit.generators.vllm.generator"):
        found = drafting.generate(prompts, GREEDY)
    assert agreement(found, generator.generate(prompts, GREEDY), model, prompts) >= 0.95
    assert [record for record in caplog.records if "drafted tokens were accepted" in record.message]
    print(caplog.records[-1].message)

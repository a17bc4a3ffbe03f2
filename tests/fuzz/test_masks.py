"""Fuzzers of chat masks: the marked tokens of any conversation are its assistant's turns, or it is refused."""

import random
from itertools import groupby

import pytest

from distillkit.data.chat import encode, encode_response
from distillkit.data.template_spans import template_end
from distillkit.types import Record
from helpers.fuzzing import TEXTS, any_text, fuzz, mutated
from helpers.models import END, END_ID, tiny_tokenizer

CHATML = tiny_tokenizer().chat_template
TEMPLATES = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("message['content']", "message['content'] | trim"),
    "words": (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% elif m.role == 'system' %}"
        "{{ m.content }}\n{% else %} {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    ),
    "thinking": CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] }}",
    ),
    "strict": CHATML.replace(
        "{% for message in messages %}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}",
    ),
}
FRAGMENTS = (
    *(text for text in TEXTS if "\ud83d" not in text and len(text) < 400),
    *("<|im_start|>", END, "<|im_start|>assistant\n", "<think>", "</think>", "Q: ", "\nA:", "{{ x }}", "{% if %}"),
    *("What is two?", "It is four.", " four", "🌊", "世界", "\r\n", "\t"),
)


def conversation(rng: random.Random) -> Record:
    """Turns in the order in which rows of data have them, with wild contents."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": "x"} for number in range(rng.randint(1, 6))]
    if rng.random() < 0.3:
        turns.insert(0, {"role": "system", "content": "x"})
    for turn in turns:
        turn["content"] = any_text(rng, FRAGMENTS, most=4) or rng.choice(("Hi", " "))
    if turns[-1]["role"] == "assistant" and rng.random() < 0.2:
        turns[-1]["reasoning_content"] = any_text(rng, FRAGMENTS, most=3)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    untrained = frozenset(index for index in answers[:-1] if rng.random() < 0.2)
    return Record(tuple(turns), "a.jsonl line 7", untrained, rng.random() < 0.9)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_marked_is_what_the_assistant_said(name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]

    def read(record: Record) -> None:
        prompt = encode(record, tokenizer, (END_ID,), chat=True)
        assert len(prompt.reference_mask) == len(prompt.reference_ids)
        if record.messages[-1]["role"] != "assistant":
            assert prompt.reference_ids == ()
            return
        assert prompt.reference_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert all(prompt.reference_mask[len(prompt.input_ids) :]), "the last answer is trained on to its end"
        pairs = groupby(zip(prompt.reference_mask, prompt.reference_ids, strict=True), key=lambda pair: pair[0])
        marked = [tokenizer.decode([token for _, token in stretch]) for mark, stretch in pairs if mark]
        answers = [
            turn["content"]
            for index, turn in enumerate(record.messages)
            if turn["role"] == "assistant" and index not in record.untrained
        ]
        if not record.ended and not answers[-1].strip():  # it may leave nothing
            return
        assert len(marked) == len(answers), "each answer is one stretch"
        for text, answer in zip(marked, answers, strict=True):
            if END not in answer:
                assert answer.strip() in text
                assert text.count(END) <= 1
                assert "Q: " not in text or "Q: " in answer

    outcome = fuzz(f"masks, {name}", conversation, read)
    assert outcome.accepted > 0


def test_any_template_renders_or_is_refused_in_one_line() -> None:
    tokenizer = tiny_tokenizer()
    record = Record(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}), "a.jsonl line 7")

    def render(template: bytes) -> None:
        tokenizer.chat_template = template.decode("utf-8", "replace")
        template_end(tokenizer)
        encode(record, tokenizer, (END_ID,), chat=True)

    outcome = fuzz("templates", lambda rng: mutated(rng.choice(list(TEMPLATES.values())).encode(), rng), render)
    assert outcome.accepted > 0
    assert outcome.refused["DataError"] > 0


def test_an_answer_has_the_tokens_that_it_would_have_in_the_data() -> None:
    tokenizer = tiny_tokenizer()

    def compare(record: Record) -> None:
        last = record.messages[-1]
        if last["role"] != "assistant" or "reasoning_content" in last or not record.ended:
            return
        prompt = encode(record, tokenizer, (END_ID,), chat=True)
        answer = encode_response(prompt, last["content"], True, tokenizer, (END_ID,))
        assert prompt.reference_ids[len(prompt.input_ids) :] == answer

    fuzz("answers in the data", conversation, compare)


def test_plain_text_is_marked_from_the_end_of_the_prompt() -> None:
    tokenizer = tiny_tokenizer()

    def read(record: Record) -> None:
        prompt = encode(record, tokenizer, (END_ID,), chat=False)
        if prompt.reference_ids:
            assert prompt.reference_mask.count(True) == len(prompt.reference_ids) - len(prompt.input_ids)

    fuzz("plain text", conversation, read)

"""Chat templates of one's choice, their arguments, the date that they print, and what they write at a turn's end."""

import itertools
from datetime import date
from pathlib import Path

import pytest

from distillkit.data.chat import encode, encode_response, require_chat_template
from distillkit.data.chat_templates import (
    check_template,
    prints_date,
    read_template,
    ready_templates,
    with_arguments,
    with_date,
)
from distillkit.data.encoding import encode_all
from distillkit.data.records import Record
from distillkit.data.template_spans import template_end
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.models.tokenizers import eos_ids, fingerprint, set_template
from helpers.models import CHAT_TEMPLATE, END_ID, tiny_tokenizer

MARKS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3-no-think": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "harmony": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
    "plain": [],
}
ENDS = {
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "harmony": "<|return|>",
}
"""Of each template the token that ends an answer; of the rest it is the tiny tokenizer's end token."""

# The shapes of well-known templates.
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today Date: {{ date_string }}\n" + CHAT_TEMPLATE
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer(*marks, template=None, eos=None, special=True):
    """The tiny tokenizer with further tokens."""
    tok = tiny_tokenizer()
    tok.add_tokens([*marks, *([eos] if eos else [])], special_tokens=special)
    if eos:
        tok.eos_token = eos
    tok.chat_template = template
    return tok


def conversation(*contents, system=None):
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), contents)]
    return Record((*([{"role": "system", "content": system}] if system else []), *turns), "a.jsonl line 7")


def trained_texts(prompt, tok):
    """The texts of the marked stretches of the reference."""
    pairs = itertools.groupby(zip(prompt.reference_mask, prompt.reference_ids, strict=True), key=lambda pair: pair[0])
    return [tok.decode([token for _, token in stretch]) for mark, stretch in pairs if mark]


# ── ready templates ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_ready_template_is_tried_here():
    assert ready_templates() == sorted(MARKS)


@pytest.mark.parametrize("name", sorted(MARKS))
def test_a_ready_template_only_appends_and_ends_each_answer_with_an_end_token(name):
    tok = tokenizer(*MARKS[name])
    set_template(tok, name, {}, None)
    end_ids = eos_ids(tok, None)
    prompt = encode(conversation("Hi\n", " one", "and", "two\n", system="Be kind."), tok, end_ids, chat=True)
    end = ENDS.get(name, "<|im_end|>")
    assert trained_texts(prompt, tok) == [f" one{end}", f"two\n{end}"]
    assert tok.convert_tokens_to_ids(end) in end_ids
    assert "Be kind." in tok.decode(prompt.input_ids)
    assert "{#" not in tok.decode(prompt.input_ids)


def test_a_ready_template_begins_with_the_token_that_the_tokenizer_puts_first():
    tok = tokenizer("<s>")
    tok.bos_token = "<s>"
    assert not read_template("plain", tok).startswith("{{ bos_token }}")
    tok.add_bos_token = True
    set_template(tok, "plain", {}, None)
    prompt = encode(conversation("Hi"), tok, (END_ID,), chat=True)
    assert tok.decode(prompt.input_ids) == "<s>### User:\nHi\n\n### Assistant:\n"


def test_a_ready_template_whose_tokens_the_tokenizer_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"chat_template: llama3 writes <\|end_header_id\|>, .* has no token for"):
        read_template("llama3", tiny_tokenizer())


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_may_be_a_file_or_the_teachers(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text(PHI_3)
    tok, teacher = tiny_tokenizer(), tokenizer(template=QWEN_3)
    check_template("Student", str(file), None)
    set_template(tok, str(file), {}, None)
    assert tok.chat_template == PHI_3
    before = fingerprint(tok)
    set_template(tok, "teacher", {}, teacher)
    assert tok.chat_template == QWEN_3
    assert fingerprint(tok) != before


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("none.jinja", None, r"Student\.chat_template must be a Jinja file, teacher or one of chatml, .* is no file"),
        (None, {"messages": []}, r"Student\.template_kwargs can't set 'messages'"),
        (None, {"tools": [{"name": "f"}]}, r"Student\.template_kwargs can't set 'tools': name a variable"),
        (None, {"documents": []}, r"Student\.template_kwargs can't set 'documents'"),
        (None, {"a b": 1}, r"Student\.template_kwargs can't set 'a b'"),
        (None, {"a": object()}, r"Student\.template_kwargs\.a must be a text, a number, .* got a object"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(template, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_template("Student", template, arguments)


def test_arguments_are_defaults_of_the_templates_variables():
    tok, messages = tokenizer(template=QWEN_3), [{"role": "user", "content": "Hi"}]
    plain = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before = fingerprint(tok)
    set_template(tok, None, {"enable_thinking": False}, None)
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == plain + "<think>\n\n</think>\n\n"
    later = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert later == plain, "whoever has the export can still say otherwise"
    assert fingerprint(tok) != before
    prompt = encode(conversation("Hi", "yes"), tok, (END_ID,), chat=True)
    assert trained_texts(prompt, tok) == ["yes<|im_end|>"]


def test_arguments_are_those_of_the_default_of_several_templates_and_the_others_stay():
    tok = tokenizer(template={"default": QWEN_3, "tool_use": PHI_3})
    set_template(tok, None, {"enable_thinking": False}, None)
    prompt = encode(conversation("Hi", "yes"), tok, (END_ID,), chat=True)
    assert tok.decode(prompt.input_ids).endswith("<think>\n\n</think>\n\n")
    assert tok.chat_template["tool_use"] == PHI_3


@pytest.mark.parametrize("value", [None, True, 1.5, 'a "b"\n', [1, "x"], {"k": [None]}])
def test_an_argument_has_the_value_that_was_set(value):
    tok = tokenizer(template="{{ thing | tojson }}" if value is not None else "{{ thing is none }}")
    set_template(tok, None, {"thing": value}, None)
    expected = tokenizer(template="{{ thing | tojson }}" if value is not None else "{{ thing is none }}")
    messages = [{"role": "user", "content": ""}]
    assert tok.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(
        messages, tokenize=False, thing=value
    )


def test_an_argument_that_the_template_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(ConfigError, match=r"has no variable enable_thinkin\. It has: enable_thinking\."):
        with_arguments(QWEN_3, {"enable_thinkin": False})
    assert with_arguments(LLAMA_3_2, {"date_string": "x"}) != LLAMA_3_2
    assert with_arguments("\n" + QWEN_3, {}) == "\n" + QWEN_3


def test_an_argument_that_the_tokenizer_sets_itself_is_refused():
    tok = tokenizer(template="{{ eos_token }}{{ bos_token }}{{ messages[0].content }}")
    with pytest.raises(ConfigError, match=r"template_kwargs: eos_token would have no effect, since the tokenizer"):
        set_template(tok, None, {"eos_token": ""}, None)
    set_template(tok, None, {"bos_token": "<s>"}, None)  # this tokenizer has none, so the default holds
    assert tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|im_end|><s>Hi"


# ── templates that lose what a message says ───────────────────────────────────────────────────────────────────────────

# As SmolVLM's, Idefics3's and LLaVA's: the content is a list of parts, of which a plain text has none.
PARTS = (
    "<|im_start|>{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# As Phi-3's first one, which knows no system message.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
# As SmolLM3's: a flag in the system message chooses the mode, and is not written.
FLAG = (
    "{% set thinks = '/no_think' not in messages[0].content %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.replace('/no_think', '') }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if not thinks %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
# As DeepSeek-R1's first one and RWKV's: what stands before the end of the thought is left out.
FORGETS_THOUGHT = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
# As QwQ's and Nemotron 3's: the prompt opens the thought with which an answer begins.
OPENS_THOUGHT = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%").replace(
    "{{ message['content'] }}", "{{ message['content'].replace('<think>hm', '<think>\nhm\n') }}"
)


@pytest.mark.parametrize(
    ("template", "contents", "system", "message"),
    [
        (PARTS, ["What?"], None, r"does not write the user message 'What\?': choose one that does"),
        (PARTS, ["What?", "four"], None, r"does not write the whole of assistant turn 1"),
        (NO_SYSTEM, ["What?"], "Be kind", r"does not write the system message 'Be kind'"),
        (NO_SYSTEM, ["What?", "four"], "Be kind", r"does not write the system message 'Be kind'"),
        (FORGETS_THOUGHT, ["What?", "<think>hm</think>four"], None, r"does not write the whole of assistant turn 1"),
        (FORGETS_THOUGHT, ["a", "x", "b", "<think>hm</think>y"], None, r"does not write the whole of assistant turn 2"),
    ],
)
def test_a_template_that_loses_what_a_message_says_is_refused(template, contents, system, message):
    tok = tokenizer("<|user|>", "<|assistant|>", "<|end|>", template=template)
    with pytest.raises(DataError, match=rf"^a\.jsonl line 7: the chat template of .* {message}"):
        encode(conversation(*contents, system=system), tok, eos_ids(tok, None), chat=True)


def test_a_response_whose_reasoning_a_template_loses_is_refused():
    tok = tokenizer(template=FORGETS_THOUGHT)
    prompt = encode(conversation("What?"), tok, (END_ID,), chat=True)
    with pytest.raises(DataError, match=r"does not write the whole of assistant turn 1"):
        encode_response(prompt, "<think>hm</think>four", True, tok, (END_ID,))
    assert tok.decode(encode_response(prompt, "four", True, tok, (END_ID,))) == "four<|im_end|>"


def test_a_message_that_is_not_written_may_have_an_effect():
    tok = tokenizer("<think>", "</think>", template=FLAG)
    prompt = encode(conversation("What?", system="/no_think"), tok, (END_ID,), chat=True)
    assert tok.decode(prompt.input_ids).endswith("assistant\n<think>\n\n</think>\n")
    tok = tokenizer(template=FORGETS_THOUGHT)
    prompt = encode(conversation("a", "<think>hm</think>one", "b"), tok, (END_ID,), chat=True)
    assert "assistant\none<|im_end|>" in tok.decode(prompt.input_ids)


@pytest.mark.parametrize("answer", ["<think>hm</think>four", "<think>hm</think>four <|im_end|> five"])
def test_an_answer_that_the_template_spaces_otherwise_is_trained_on_to_its_end(answer):
    tok = tokenizer(template=OPENS_THOUGHT)
    prompt = encode(conversation("What?", answer), tok, (END_ID,), chat=True)
    assert tok.decode(prompt.input_ids).endswith("assistant\n<think>\n")
    text = answer.removeprefix("<think>hm")
    assert trained_texts(prompt, tok) == [f"hm\n{text}<|im_end|>"]


def test_a_template_that_does_not_write_the_answer_tells_no_end_of_turn():
    tok = tokenizer("<|end|>", template=PARTS)
    assert template_end(tok) is None
    assert eos_ids(tok, None) == (END_ID,)


# ── dates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A, %-d.%-m.%y", "100 %%"])
@pytest.mark.parametrize("day", [date(2026, 11, 28), date(2031, 3, 7)])
def test_a_fixed_date_is_printed_in_every_form(form, day):
    tok = tokenizer(template=with_date("\n{{ strftime_now('" + form + "') }}", day))
    assert tok.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "\n" + day.strftime(form)


def test_only_templates_that_print_a_date_are_fixed():
    assert [prints_date(template) for template in (LLAMA_3_2, QWEN_3, None)] == [True, False, False]
    tok = tokenizer(template=with_date(LLAMA_3_2, date(2024, 2, 29)))
    text = tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "Today Date: 29 Feb 2024\n<|im_start|>user\nHi<|im_end|>\n"


# ── the end of a turn ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("special", [True, False])
def test_what_a_template_writes_after_an_answer_is_an_end_of_turn(special):
    tok = tokenizer("<|end|>", "<|end|>x", eos="<|endoftext|>", template=PHI_3, special=special)
    assert template_end(tok) == tok.convert_tokens_to_ids("<|end|>")
    assert eos_ids(tok, None) == (tok.convert_tokens_to_ids("<|endoftext|>"), tok.convert_tokens_to_ids("<|end|>"))


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }} stop <|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_writes_no_such_token_adds_none(template):
    tok = tokenizer(eos="<|endoftext|>", template=template)
    assert template_end(tok) is None
    assert eos_ids(tok, None) == (tok.eos_token_id,)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for x in 3 %}{% endfor %}", "TypeError: 'int' object is not iterable"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError: maximum recursion depth"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
        ("{{ broken", "expected token 'end of print statement'|unexpected end of template"),
    ],
)
def test_what_a_template_raises_is_one_line_that_names_the_record(template: str, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    record = Record(({"role": "user", "content": "x"},), "a.jsonl line 7")
    with pytest.raises(DataError, match=rf"a\.jsonl line 7 is refused by the chat template of .*({reason})"):
        encode(record, tokenizer, (END_ID,), chat=True)
    assert template_end(tokenizer) is None


def test_conversations_of_a_template_with_an_end_besides_the_tokenizers_are_encoded_without_an_alarm():
    tok = tokenizer("<|end|>", eos="<|endoftext|>", template=PHI_3)
    rows = [conversation("a", "one", "b", "two"), conversation("c", "three")]
    prompts, report = encode_all(rows, tok, eos_ids(tok, None), True, None, 512, "error")
    assert [trained_texts(prompt, tok) for prompt in prompts] == [["one<|end|>", "two<|end|>"], ["three<|end|>"]]
    assert str(report) == "2 prompts"


def test_a_template_that_does_not_begin_an_answer_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "some/model"
    require_chat_template(tokenizer, True)
    tokenizer.chat_template = tokenizer.chat_template.partition("{% if add_generation_prompt")[0]
    message = r"of some/model writes '<\|im_start\|>assistant' before an answer, but not at the end of a prompt"
    with pytest.raises(ModelError, match=message):
        require_chat_template(tokenizer, True)
    require_chat_template(tokenizer, False)


def test_a_template_that_puts_nothing_before_an_answer_needs_no_prompt_for_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # as Llama 2 and Mistral
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    require_chat_template(tokenizer, True)

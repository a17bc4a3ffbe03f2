"""Turns that are not trained on, reasoning before an answer, and several responses to a prompt."""

from dataclasses import replace

import pytest

from distillkit.data.chat import encode, encode_response
from distillkit.data.encoding import encode_all
from distillkit.errors import DataError
from distillkit.types import Record
from helpers.models import END_ID, tiny_tokenizer

# The parts of Qwen3's template that write reasoning: that of the last answer, in its own key or within its content.
QWEN3 = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}"
    "{%- if not reasoning and '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.last or reasoning %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content.lstrip('\\n') + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKING = QWEN3.replace("reasoning_content", "thinking")


def tokenizer(template=None):
    tok = tiny_tokenizer()
    tok.chat_template = template or tok.chat_template
    return tok


def record(*contents, untrained=(), **last):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    turns[-1] |= last
    return Record(tuple(turns), f"a.jsonl line {len(contents)}", frozenset(untrained))


def trained(prompt, tok):
    return tok.decode([i for i, used in zip(prompt.reference_ids, prompt.reference_mask, strict=True) if used])


def test_a_turn_of_weight_0_is_in_the_context_and_not_trained_on():
    tok = tokenizer()
    conversation = record("What?", "Hello", "And?", "four", untrained={1})
    prompt = encode(conversation, tok, (END_ID,), chat=True)
    assert trained(prompt, tok) == "four<|im_end|>"
    assert "Hello<|im_end|>" in tok.decode(prompt.input_ids)
    with_system = encode(conversation, tok, (END_ID,), chat=True, system="Be kind")
    assert trained(with_system, tok) == "four<|im_end|>"
    whole = encode(record("What?", "Hello", "And?", "four"), tok, (END_ID,), chat=True)
    assert trained(whole, tok) == "Hello<|im_end|>four<|im_end|>"
    assert (whole.id, whole.reference_ids) == (prompt.id, prompt.reference_ids)


@pytest.mark.parametrize("template", [QWEN3, THINKING], ids=["reasoning_content", "thinking"])
def test_reasoning_is_trained_on_before_its_answer(template):
    tok = tokenizer(template)
    prompt = encode(record("What?", "four", reasoning_content="Two and two: four?"), tok, (END_ID,), chat=True)
    assert trained(prompt, tok) == "<think>\nTwo and two: four?\n</think>\n\nfour<|im_end|>"
    assert prompt.reference == "<think>\nTwo and two: four?\n</think>\n\nfour"
    assert prompt.id == encode(record("What?", "four"), tok, (END_ID,), chat=True).id


def test_a_cut_answer_of_which_nothing_is_left_has_nothing_to_train_on():
    tok = tokenizer(tokenizer().chat_template.replace("message['content']", "message['content'] | trim"))
    cut = replace(record("What?", "\n", reasoning_content="\n"), ended=False)
    prompt = encode(cut, tok, (END_ID,), chat=True)
    assert prompt.reference_ids == prompt.input_ids
    assert (trained(prompt, tok), prompt.reference) == ("", "")


def test_reasoning_that_the_template_does_not_write_is_refused():
    with pytest.raises(DataError, match=r"a\.jsonl line 2: the chat template of .* does not write the reasoning"):
        encode(record("What?", "four", reasoning_content="Hm"), tokenizer(), (END_ID,), chat=True)
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has reasoning, which plain text can't hold"):
        encode(record("What?", "four", reasoning_content="Hm"), tokenizer(), (END_ID,), chat=False)


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("four", True, "<think>\nTwo, two.\n</think>\n\nfour<|im_end|>"),
        ("fo", False, "<think>\nTwo, two.\n</think>\n\nfo"),
        ("", False, "<think>\nTwo, two."),
        ("", True, "<think>\nTwo, two.\n</think>\n\n<|im_end|>"),
    ],
)
def test_reasoning_of_a_response_is_written_as_far_as_it_came(text, ended, expected):
    tok = tokenizer(QWEN3)
    prompt = encode(record("What?"), tok, (END_ID,), chat=True)
    ids = encode_response(prompt, text, ended, tok, (END_ID,), reasoning="Two, two.")
    assert tok.decode(ids) == expected
    plain = tokenizer()
    prompt = encode(record("What?"), plain, (END_ID,), chat=True)
    with pytest.raises(DataError, match="does not write the reasoning"):
        encode_response(prompt, text, ended, plain, (END_ID,), "Hm")


# As Qwen3.5's: the prompt opens a thought.
OPENED = QWEN3.replace(
    "'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


@pytest.mark.parametrize(("template", "opening"), [(QWEN3, "<think>\n"), (OPENED, "")])
def test_an_answer_that_was_cut_within_a_thought_of_its_text_gets_no_other_thought(template, opening):
    tok = tokenizer(template)
    prompt = encode(record("What?"), tok, (END_ID,), chat=True)
    ids = encode_response(prompt, "<think>\nTwo, two, so", False, tok, (END_ID,))
    assert tok.decode(ids) == f"{opening}Two, two, so"
    whole = encode_response(prompt, "<think>\nTwo.\n</think>\n\nfour", True, tok, (END_ID,))
    assert tok.decode(whole) == f"{opening}Two.\n</think>\n\nfour<|im_end|>"
    cut = replace(record("What?", "<think>\nTwo, two, so"), ended=False)
    with pytest.raises(
        DataError, match=r"a\.jsonl line 2: the chat template of .* closes a thought before assistant turn 1"
    ):
        encode(cut, tok, (END_ID,), chat=True)


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_that_was_cut_has_no_end_of_turn(chat):
    tok = tokenizer()
    whole = record("What?", "four")
    cut = encode(replace(whole, ended=False), tok, (END_ID,), chat)
    assert encode(whole, tok, (END_ID,), chat).reference_ids == (*cut.reference_ids, END_ID)
    assert trained(cut, tok) == "four"


def encoded(records, **settings):
    tok = tokenizer()
    return encode_all(records, tok, (END_ID,), chat=True, system=None, max_length=99, overlong="error", **settings)


def test_several_responses_to_a_prompt_are_all_used_where_responses_are():
    records = [record("What?", answer) for answer in ("four", "two", "four", "two", "five")]
    prompts, report = encoded(records, responses="all")
    assert [prompt.reference for prompt in prompts] == ["four", "two", "five"]
    assert len({prompt.id for prompt in prompts}) == 3
    assert (report.num_prompts, len(report.duplicates)) == (3, 2)
    first, report = encoded(records)
    assert [prompt.reference for prompt in first] == ["four"]
    assert (report.num_prompts, len(report.duplicates)) == (1, 4)
    assert first[0].id == prompts[0].id, "the first response leaves its prompt as it is"
    again, _ = encoded([records[0], records[4], records[1]], responses="all")
    assert {prompt.id for prompt in again} == {prompt.id for prompt in prompts}


def test_records_that_cant_be_encoded_are_left_out_and_counted():
    bad = Record(
        ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "a", "reasoning_content": "b"}),
        "line 2",
    )
    prompts, report = encoded([record("What?", "four"), bad, record("Who?", "two")], on_error="skip")
    assert len(prompts) == 2
    assert len(report.problems) == 1
    assert report.problems[0].startswith("line 2: the chat template")
    assert "1 left out since they can't be encoded" in str(report)
    with pytest.raises(DataError, match="line 2: the chat template"):
        encoded([bad])


def test_responses_that_quote_an_end_of_turn_are_trained_on_whole_and_counted():
    quoting, prompt_only = record("a", "say <|im_end|> twice"), record("<|im_end|>", "b")
    prompts, report = encoded([quoting, prompt_only, record("c", "<|im_end|>", "d", "e")])
    assert trained(prompts[0], tokenizer()) == "say <|im_end|> twice<|im_end|>"
    assert (report.inner_ends, report.unended) == (1, 0)
    assert "1 responses whose text has an end-of-turn token" in str(report)

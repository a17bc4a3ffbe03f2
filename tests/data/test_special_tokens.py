"""Texts that contain the tokenizer's special tokens already: pre-rendered prompts, responses with their end."""

import pytest
from tokenizers.processors import TemplateProcessing

from distillkit.data.chat import encode, encode_response
from distillkit.types import Record
from helpers.models import END, END_ID, tiny_tokenizer


def record(*contents):
    """A conversation whose turns alternate, the user's first."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return Record(tuple(turns), "a.jsonl line 7")


def test_plain_text_that_begins_and_ends_with_special_tokens_gets_no_second_ones():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    first = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    rendered = "<s><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"

    prompt = encode(record(rendered, f"four{END}"), tokenizer, (END_ID,), chat=False)

    assert tokenizer.decode(prompt.input_ids) == rendered
    assert tokenizer.decode(prompt.reference_ids) == f"{rendered}four{END}"
    assert prompt.reference_mask == tuple(i >= len(prompt.input_ids) for i in range(len(prompt.reference_ids)))
    for text in ("four", f"four{END}"):
        assert tokenizer.decode(encode_response(prompt, text, True, tokenizer, (END_ID,))) == f"four{END}"


@pytest.mark.parametrize("answer", [f"four{END}", f"four{END}\n", f"four{END}{END}"])
def test_an_answer_that_has_its_end_of_turn_already_ends_there(answer):
    tokenizer = tiny_tokenizer()

    prompt = encode(record("What?", answer, "And?", answer), tokenizer, (END_ID,), chat=True)

    used = [token for token, mark in zip(prompt.reference_ids, prompt.reference_mask, strict=True) if mark]
    assert tokenizer.decode(used) == f"four{END}four{END}"
    later = encode(record("What?"), tokenizer, (END_ID,), chat=True)
    assert tokenizer.decode(encode_response(later, answer, True, tokenizer, (END_ID,))) == f"four{END}"

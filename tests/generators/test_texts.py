import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillkit.data.chat import encode
from distillkit.generators.texts import as_response, decoded
from distillkit.types import Record
from helpers.models import END, END_ID, tiny_tokenizer


def sentencepiece_like():
    """A tokenizer that begins each text with a space, and leaves it out where it decodes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator(["what is two and two it is four"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def prompt_of(tokenizer, text, chat):
    return encode(Record(({"role": "user", "content": text},), "here"), tokenizer, (tokenizer.eos_token_id,), chat)


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
def test_a_plain_prompt_and_the_text_of_its_response_are_one_text(make):
    tokenizer = make()
    prompt = prompt_of(tokenizer, "what is two", chat=False)
    ids = tokenizer.encode("what is two and two", add_special_tokens=False)[len(prompt.input_ids) :]
    for tokens in (ids, [*ids, tokenizer.eos_token_id]):
        assert decoded(tokenizer, tokens, (tokenizer.eos_token_id,), prompt) == " and two"
    response = as_response(prompt, " and two", True, tokenizer, (tokenizer.eos_token_id,), 50)
    assert (response.text, list(response.token_ids)) == (" and two", [*ids, tokenizer.eos_token_id])


def test_an_answer_in_a_chat_has_no_outer_whitespace():
    tokenizer = tiny_tokenizer()
    prompt = prompt_of(tokenizer, "What?", chat=True)
    ids = tokenizer.encode(" Four.\n", add_special_tokens=False)
    assert decoded(tokenizer, [*ids, END_ID], (END_ID,), prompt) == "Four."
    assert as_response(prompt, " Four.\n", True, tokenizer, (END_ID,), 50).text == "Four."


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_a_response_cut_within_a_character_ends_before_it(chat):
    tokenizer = tiny_tokenizer()
    prompt = prompt_of(tokenizer, "What?", chat)
    ids = tokenizer.encode("Four €", add_special_tokens=False)  # the last three tokens are one character
    assert decoded(tokenizer, ids, (END_ID,), prompt) == "Four €"
    for cut in (1, 2):
        assert decoded(tokenizer, ids[:-cut], (END_ID,), prompt).rstrip() == "Four"
    assert as_response(prompt, "Four €", True, tokenizer, (END_ID,), len(ids) - 1).text.rstrip() == "Four"


def test_an_answer_of_a_server_that_shows_its_end_or_half_of_a_character_is_without_it():
    tokenizer = tiny_tokenizer()
    prompt = prompt_of(tokenizer, "What?", chat=True)
    ended = as_response(prompt, f"Four.{END}", True, tokenizer, (END_ID,), 50)
    assert (ended.text, tokenizer.decode(ended.token_ids)) == ("Four.", f"Four.{END}")
    cut = as_response(prompt, "Four \N{REPLACEMENT CHARACTER}", False, tokenizer, (END_ID,), 50)
    assert (cut.text, tokenizer.decode(cut.token_ids), cut.finish) == ("Four", "Four ", "length")

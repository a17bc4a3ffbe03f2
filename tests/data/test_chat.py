import hashlib
import random
from itertools import groupby

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distillkit.data.chat import encode, encode_response, require_chat_template
from distillkit.data.encoding import EncodeReport, encode_all
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.types import Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# As Qwen3: the last answer gets an empty thought, earlier ones lose theirs.
THINKING = CHATML.replace("{% generation %}", "{% generation %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}")
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or loop.index0 != 3 else 'gone' }}")
# As DeepSeek-R1: the prompt opens a thought that finished answers do not have.
OPEN_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = [
    "assistant user system model\n\nHello there, what is two and two?\n\nIt is four.\n\n",
    "four 4\n\n\nI see",
] * 3
SPLIT = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # joins newlines, as Qwen's


def tokenizer(template=None, trim_offsets=True):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    named = {"name_or_path": "some/model", "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", **named)


def ids(tok, *texts):
    return tuple(tok.convert_tokens_to_ids(text) for text in texts)


def record(*contents, system=None):
    """A conversation whose turns alternate, the user's first."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return Record((*([{"role": "system", "content": system}] if system is not None else []), *turns), "a.jsonl line 7")


def written(prompt, tok):
    """The texts of the marked stretches of the reference."""
    marked = groupby(zip(prompt.reference_mask, prompt.reference_ids, strict=True), key=lambda pair: pair[0])
    return [tok.decode([token for _, token in pairs]) for mark, pairs in marked if mark]


def test_a_single_answer_is_what_a_model_would_write_after_the_prompt():
    tok = tokenizer(CHATML)

    prompt = encode(record("What is two?", "four", system="Be kind"), tok, ids(tok, "<|im_end|>"), chat=True)

    rendered = (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok.decode(prompt.input_ids) == rendered
    response = tuple(tok("four<|im_end|>")["input_ids"])
    assert prompt.reference_ids == prompt.input_ids + response
    assert prompt.reference_mask == (False,) * len(prompt.input_ids) + (True,) * len(response)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


def test_every_answer_of_a_conversation_is_marked_with_its_end_but_not_the_newline_after_it():
    tok = tokenizer(CHATML)

    prompt = encode(record("What?", "Hello", "And?", "four"), tok, ids(tok, "<|im_end|>"), chat=True)

    assert written(prompt, tok) == ["Hello<|im_end|>", "four<|im_end|>"]
    assert tok.decode(prompt.reference_ids).endswith("four<|im_end|>")
    assert tok.decode(prompt.input_ids).endswith("And?<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_that_ends_with_the_user_has_no_reference():
    tok = tokenizer(CHATML)

    prompt = encode(record("What?", "Hello", "And?"), tok, ids(tok, "<|im_end|>"), chat=True)

    assert tok.decode(prompt.input_ids).endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.reference_ids == ()
    assert prompt.reference_mask == ()
    assert len(prompt.messages) == 3


CONTENTS = [
    "four",
    " two ",
    "It is four.",
    "\n\nHello\n",
    "é 🙂",
    " what <|im_end|> is ",
    "I see<|im_start|>user\n",
    "\n4",
]


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
def test_prompt_and_response_together_are_the_reference_for_every_content(template):
    tok = tokenizer(template)
    for question in CONTENTS:
        for answer in CONTENTS:
            prompt = encode(record(question, answer), tok, ids(tok, "<|im_end|>"), chat=True)

            response = tuple(t for t, m in zip(prompt.reference_ids, prompt.reference_mask, strict=True) if m)
            assert prompt.input_ids + response == prompt.reference_ids
            shown = answer.strip() if template is TRIMMED else answer
            assert tok.decode(response) == f"{shown}<|im_end|>"


def test_the_marks_are_those_of_transformers_for_random_conversations():
    tok = tokenizer(CHATML, trim_offsets=False)  # transformers goes by offsets
    draw = random.Random(0)
    for _ in range(40):
        # transformers marks a token that joins the header's newline with the answer's: such answers are left out.
        turns = [draw.choice([text for text in CONTENTS if text[0] != "\n"]) for _ in range(2 * draw.randint(1, 3))]
        one = record(*turns, system=draw.choice([None, "Be kind"]))
        told = tok.apply_chat_template(
            list(one.messages), return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )

        prompt = encode(one, tok, ids(tok, "<|im_end|>"), chat=True)

        length = len(prompt.reference_ids)
        assert list(prompt.reference_ids) == told["input_ids"][:length]
        assert [int(mark) for mark in prompt.reference_mask] == told["assistant_masks"][:length]
        assert tok.decode(told["input_ids"][length:]) == "\n"
        assert prompt.reference_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_an_answer_that_starts_with_a_newline_is_not_joined_with_the_newline_before_it():
    tok = tokenizer(CHATML)
    assert len(tok("\n\n")["input_ids"]) == 1

    prompt = encode(record("What?", "\nfour", "And?", "\nHello"), tok, ids(tok, "<|im_end|>"), chat=True)

    assert written(prompt, tok) == ["\nfour<|im_end|>", "\nHello<|im_end|>"]


def test_llama_2_answers_are_marked_from_their_space_to_their_end():
    tok = tokenizer(LLAMA_2)

    prompt = encode(record("What?", " Hello\n", "And?", "four"), tok, ids(tok, "</s>"), chat=True)

    assert tok.decode(prompt.reference_ids) == "<s>[INST] What? [/INST] Hello </s><s>[INST] And? [/INST] four </s>"
    assert written(prompt, tok) == [" Hello </s>", " four </s>"]


@pytest.mark.parametrize("ends", [("<|im_end|>", "<end_of_turn>"), ("<end_of_turn>",)])
def test_gemma_answers_are_marked_though_their_role_is_model(ends):
    tok = tokenizer(GEMMA)

    prompt = encode(record("What?", " Hello\n", "And?", "four"), tok, ids(tok, *ends), chat=True)

    assert written(prompt, tok) == ["Hello<end_of_turn>", "four<end_of_turn>"]
    assert tok.decode(prompt.input_ids).endswith("<start_of_turn>model\n")


def test_without_a_known_end_of_turn_an_answer_ends_with_its_turn_less_whitespace():
    tok = tokenizer(GEMMA.replace("<end_of_turn>", ""))

    prompt = encode(record("What?", "Hello", "And?", "four."), tok, ids(tok, "</s>"), chat=True)

    assert written(prompt, tok) == ["Hello", "four."]


def test_a_thought_that_the_template_adds_to_an_answer_belongs_to_it():
    tok = tokenizer(THINKING)

    prompt = encode(record("What?", "four"), tok, ids(tok, "<|im_end|>"), chat=True)

    assert written(prompt, tok) == ["<think>\n\n</think>\n\nfour<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "contents", "turn"),
    [
        (THINKING, ["What?", "Hello", "And?", "four"], 1),
        (OPEN_THOUGHT, ["What?", "four"], 1),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ["What?", "four"], 1),
        (FORGETFUL, ["What?", "Hello", "And?", "four", "I see", "4"], 2),
    ],
)
def test_a_template_that_rewrites_answers_is_refused_with_the_turn(template, contents, turn):
    tok = tokenizer(template)

    with pytest.raises(DataError, match=rf"^a\.jsonl line 7: .* some/model renders assistant turn {turn} differently"):
        encode(record(*contents), tok, ids(tok, "<|im_end|>"), chat=True)


def test_a_template_that_refuses_a_role_is_quoted():
    tok = tokenizer(GEMMA)

    with pytest.raises(DataError, match=r"^a\.jsonl line 7 is refused .* some/model \(System role not supported\)"):
        encode(record("What?", system="Be kind"), tok, ids(tok, "<end_of_turn>"), chat=True)


def test_a_system_message_is_added_only_where_there_is_none():
    tok = tokenizer(CHATML)
    ends = ids(tok, "<|im_end|>")

    added = encode(record("What?"), tok, ends, chat=True, system="Be brief")

    assert added == encode(record("What?", system="Be brief"), tok, ends, chat=True)
    assert added != encode(record("What?"), tok, ends, chat=True)
    kept = record("What?", system="Be kind")
    assert encode(kept, tok, ends, chat=True, system="Be brief") == encode(kept, tok, ends, chat=True)


def test_the_id_is_a_hash_of_the_prompt_that_ignores_the_response_and_the_tokenizer():
    text = r'[{"content":"\u00e9","role":"user"},{"content":"Hello","role":"assistant"},{"content":"b","role":"user"}]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    for template, answer in [(CHATML, ["four"]), (CHATML, []), (GEMMA, ["4"])]:
        tok = tokenizer(template)

        assert encode(record("é", "Hello", "b", *answer), tok, ids(tok, "<|im_end|>"), chat=True).id == expected


def test_plain_text_is_prompt_response_and_end():
    tok = tokenizer()

    prompt = encode(record("What is two? ", "four"), tok, ids(tok, "</s>", "<|im_end|>"), chat=False)

    assert prompt.input_ids == tuple(tok("What is two? ")["input_ids"])
    assert prompt.reference_ids == prompt.input_ids + tuple(tok("four</s>")["input_ids"])
    assert written(prompt, tok) == ["four</s>"]
    assert encode(record("What?"), tok, (), chat=False).reference_ids == ()


def test_plain_text_starts_with_the_tokenizers_own_first_token_and_not_with_its_last():
    tok = tokenizer()
    first, last = ids(tok, "<s>", "</s>")
    specials = [("<s>", first), ("</s>", last)]
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    assert tok.decode(tok("What?")["input_ids"]) == "<s>What?</s>"

    prompt = encode(record("What?", "\nfour"), tok, (last,), chat=False)

    assert tok.decode(prompt.input_ids) == "<s>What?"
    assert tok.decode(prompt.reference_ids) == "<s>What?\nfour</s>"
    assert written(prompt, tok) == ["\nfour</s>"]


def sentencepiece_like():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # each text starts with a space of its own
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, name_or_path="some/model", eos_token="</s>")


@pytest.mark.parametrize(("question", "answer"), [("what is two\n", "four"), ("what is two", " four")])
def test_a_tokenizer_that_starts_each_text_with_a_space_adds_none_to_the_response(question, answer):
    tok = sentencepiece_like()

    prompt = encode(record(question, answer), tok, ids(tok, "</s>"), chat=False)

    assert prompt.reference_ids == (*tok(question + answer)["input_ids"], *ids(tok, "</s>"))
    assert prompt.reference_ids[: len(prompt.input_ids)] == prompt.input_ids == tuple(tok(question)["input_ids"])
    assert prompt.reference_mask.index(True) == len(prompt.input_ids)


def test_a_space_that_the_tokenizer_joins_with_the_response_is_refused():
    with pytest.raises(DataError, match=r"^a\.jsonl line 7: the tokenizer some/model joins .* into one token"):
        encode(record("what is two ", "four"), sentencepiece_like(), (0,), chat=False)


@pytest.mark.parametrize("contents", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_plain_text_holds_no_conversation(contents):
    with pytest.raises(DataError, match=r"^a\.jsonl line 7 has more than one prompt and one response"):
        encode(record(*contents), tokenizer(), (0,), chat=False)


def test_plain_text_holds_no_system_message():
    with pytest.raises(DataError, match=r"^a\.jsonl line 7 has more than one prompt and one response"):
        encode(record("a", system="b"), tokenizer(), (0,), chat=False)
    with pytest.raises(ConfigError, match=r"`data\.system` needs a chat template, but `data\.chat` is false"):
        encode(record("a"), tokenizer(), (0,), chat=False, system="b")


def test_a_plain_text_response_needs_an_end():
    with pytest.raises(ModelError, match="some/model has no end-of-sequence token"):
        encode(record("a", "b"), tokenizer(), (), chat=False)


def test_a_missing_chat_template_is_refused_only_where_it_is_needed():
    with pytest.raises(ModelError, match=r"^The tokenizer some/model has no chat template: set `data\.chat: false`"):
        require_chat_template(tokenizer(), chat=True)
    with pytest.raises(ModelError, match="has no chat template"):
        encode_all([], tokenizer(), (), True, None, 100, "error")
    require_chat_template(tokenizer(), chat=False)
    require_chat_template(tokenizer(CHATML), chat=True)


def test_duplicates_and_overlong_records_are_counted():
    tok = tokenizer(CHATML)
    long = record("What?", "four " * 50)
    records = [record("What?", "four"), record("And?"), long, record("What?", "4"), record("what?")]
    ends = ids(tok, "<|im_end|>")

    prompts, report = encode_all(records, tok, ends, True, None, 60, "drop")

    assert prompts == [encode(records[index], tok, ends, True) for index in (0, 1, 4)]
    length = len(encode(long, tok, ends, True).reference_ids)
    assert report == EncodeReport(
        num_prompts=3,
        duplicates=(f"{records[3].origin} has the same prompt as {records[0].origin}",),
        overlong=(f"{long.origin} has {length} tokens, more than `data.max_length: 60`",),
        unended=0,
    )
    assert [prompt.origin for prompt in prompts] == [records[index].origin for index in (0, 1, 4)]


def test_an_overlong_record_is_an_error_that_says_how_long_it_is():
    tok = tokenizer(CHATML)
    ends = ids(tok, "<|im_end|>")
    length = len(encode(record("What?", "four"), tok, ends, True).reference_ids)

    assert encode_all([record("What?", "four")], tok, ends, True, None, length, "error")[1].num_prompts == 1
    with pytest.raises(DataError, match=rf"line 7 has {length} tokens, more than `data\.max_length: {length - 1}`"):
        encode_all([record("What?", "four")], tok, ends, True, None, length - 1, "error")


def test_responses_without_an_end_of_turn_are_counted():
    tok = tokenizer(GEMMA.replace("<end_of_turn>", ""))

    _, report = encode_all([record("a", "b"), record("c")], tok, ids(tok, "<end_of_turn>"), True, None, 60, "error")

    assert report == EncodeReport(num_prompts=2, duplicates=(), overlong=(), unended=1)


@pytest.mark.parametrize("answer", ["four", " four", "\n\nIt is four.\n", "a <b> 4 ü"])
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (TRIMMED, "<|im_end|>"), (LLAMA_2, "</s>"), (THINKING, "<|im_end|>"), (None, "</s>")],
    ids=["chatml", "trimmed", "llama 2", "thinking", "plain"],
)
def test_a_later_answer_has_the_tokens_of_one_that_came_with_its_prompt(template, end, answer):
    tok, chat = tokenizer(template), template is not None
    ends = ids(tok, end)
    later = template not in (None, THINKING)  # these can't hold a conversation with two answers to learn from
    for turns in (["What is two?"], ["What is two?", "4", "And now?"])[: 1 + later]:
        prompt = encode(record(*turns), tok, ends, chat)
        whole = encode(record(*turns, answer), tok, ends, chat)
        assert whole.input_ids == prompt.input_ids

        found = encode_response(prompt, answer, True, tok, ends)
        cut = encode_response(prompt, answer, False, tok, ends)

        assert (*prompt.input_ids, *found) == whole.reference_ids
        assert found == (*cut, *ends)


def test_plain_text_is_answered_in_plain_text_whatever_the_tokenizer_has():
    tok = tokenizer(CHATML)
    prompt = encode(record("What is two?"), tok, ids(tok, "</s>"), chat=False)

    assert tok.decode(encode_response(prompt, " four", True, tok, ids(tok, "</s>"))) == " four</s>"


def test_earlier_turns_that_a_template_rewrites_do_not_matter_for_a_later_answer():
    tok = tokenizer(FORGETFUL)
    turns = ("a", "b", "c", "d", "e")
    with pytest.raises(DataError, match="renders assistant turn 2 differently"):
        encode(record(*turns, "f"), tok, ids(tok, "<|im_end|>"), chat=True)
    prompt = encode(record(*turns), tok, ids(tok, "<|im_end|>"), chat=True)

    assert tok.decode(encode_response(prompt, "f", True, tok, ids(tok, "<|im_end|>"))) == "f<|im_end|>"


def test_an_answer_that_the_template_would_write_differently_is_refused():
    tok = tokenizer(OPEN_THOUGHT)
    prompt = encode(record("What is two?"), tok, ids(tok, "<|im_end|>"), chat=True)

    with pytest.raises(DataError, match=rf"The response to prompt {prompt.id}: the chat template .* assistant turn 1"):
        encode_response(prompt, "four", True, tok, ids(tok, "<|im_end|>"))

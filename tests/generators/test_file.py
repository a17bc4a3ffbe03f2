import hashlib
import json
from dataclasses import replace

import pytest

from distillkit.data.chat import encode
from distillkit.errors import ConfigError, DataError
from distillkit.generators.file import FileGenerator
from distillkit.types import Prompts, Record, Sampling
from helpers.models import END_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(max_new_tokens=100)
ROWS = [
    {"prompt": "Which day?", "response": "Monday."},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Goodbye."},
        ]
    },
    {"prompt": "Nobody answers"},
    {"prompt": "Which day?", "response": "Tuesday."},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "strong.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def ready(path, **columns):
    generator = FileGenerator(str(path), **columns)
    generator.refresh(None, TOKENIZER)
    return generator


def prompts_of(*contents, system=None):
    records = [
        Record((*([{"role": "system", "content": system}] if system else []), *turns), "here")
        for turns in ([{"role": "user", "content": c}] if isinstance(c, str) else c for c in contents)
    ]
    return Prompts(tuple(encode(record, TOKENIZER, (END_ID,), chat=True) for record in records))


def whole(question, answer):
    """The tokens of the answer to a question that came with it."""
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    found = encode(Record(turns, "here"), TOKENIZER, (END_ID,), chat=True)
    return found.reference_ids[len(found.input_ids) :]


def test_responses_are_found_by_their_prompts(file, caplog):
    caplog.set_level("INFO", "distillkit")
    prompts = prompts_of(ROWS[1]["messages"][:3], "Which day?")
    found = ready(file).generate(prompts, SAMPLING)
    assert [(response.text, response.finish) for response in found] == [("Goodbye.", "stop"), ("Monday.", "stop")]
    assert [response.prompt_id for response in found] == [prompt.id for prompt in prompts]
    assert found[1].token_ids == whole("Which day?", "Monday.")
    assert "strong.jsonl has several responses to 1 of 2 prompts" in caplog.text


def test_each_round_and_each_seed_read_the_next_of_several_responses(file):
    prompts, generator = prompts_of("Which day?"), ready(file)
    days = [generator.generate(prompts.at_round(index), SAMPLING)[0].text for index in range(4)]
    assert days == ["Monday.", "Tuesday.", "Monday.", "Tuesday."]
    assert generator.generate(prompts, replace(SAMPLING, seed=1))[0].text == "Tuesday."


def test_a_system_message_that_the_run_puts_before_its_prompts_hides_no_response(file):
    assert ready(file).generate(prompts_of("Which day?", system="Be short."), SAMPLING)[0].text == "Monday."


def test_a_response_to_the_very_messages_comes_before_one_without_the_system_message(file):
    rows = [
        {"role": "system", "content": "Be short."},
        *ROWS[1]["messages"][:1],
        ROWS[1]["messages"][1] | {"content": "!"},
    ]
    with file.open("a") as lines:
        lines.write(json.dumps({"messages": rows}) + "\n" + json.dumps({"prompt": "Hi", "response": "?"}) + "\n")
    assert ready(file).generate(prompts_of("Hi", system="Be short."), SAMPLING)[0].text == "!"
    assert ready(file).generate(prompts_of("Hi", system="Be long."), SAMPLING)[0].text == "?"


def test_missing_responses_are_counted_and_the_first_is_named(file):
    with pytest.raises(
        DataError, match=r"strong\.jsonl has no response to 2 of 3 prompts, the first is 'Nobody answers'"
    ):
        ready(file).generate(prompts_of("Which day?", "Nobody answers", "Other"), SAMPLING)


def test_a_response_is_cut_at_the_longest_that_is_asked_for(file):
    found = ready(file).generate(prompts_of("Which day?"), Sampling(max_new_tokens=2))[0]
    assert found.token_ids == whole("Which day?", "Monday.")[:2]
    assert found.finish == "length"


def test_a_response_that_was_cut_has_no_end_of_turn(tmp_path):
    path = tmp_path / "strong.jsonl"
    path.write_text(json.dumps({"prompt": "Which day?", "response": "Mon", "finish": "length"}))
    response = ready(path).generate(prompts_of("Which day?"), SAMPLING)[0]
    assert (response.text, response.finish) == ("Mon", "length")
    assert response.token_ids == whole("Which day?", "Mon")[:-1]


def test_columns_may_have_other_names(tmp_path):
    (tmp_path / "strong.csv").write_text("question,answer\nWhich day?,Friday.\n")
    generator = ready(tmp_path / "strong.csv", prompt_column="question", response_column="answer")
    assert generator.generate(prompts_of("Which day?"), SAMPLING)[0].text == "Friday."


def test_the_identity_is_the_files_content_and_its_columns(file, tmp_path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    assert ready(file).identity() == ready(copy).identity() == f"file:{digest}"
    assert ready(file, response_column="other").identity() not in (None, f"file:{digest}")
    copy.write_text(file.read_text().replace("Monday", "Sunday"))
    assert ready(copy).identity() != f"file:{digest}"


def test_what_is_no_file_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        FileGenerator(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"FileGenerator\.path must be a file, got 'some/dataset'"):
        FileGenerator("some/dataset")

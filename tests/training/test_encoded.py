"""Encoded prompts that are kept: equal to those encoded anew, read by every process, checked, and bounded."""

import json
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from distillkit.data import encoding
from distillkit.data.encoding import encode_all
from distillkit.errors import DataError
from distillkit.training import encoded
from distillkit.training.encoded import EncodedPrompts, encode_split
from distillkit.types import Prompts, Record
from helpers.models import END_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SETTINGS = (True, None, 64, "drop", "all", "skip")


def record(index: int, prompt: str, *answers: str, **settings) -> Record:
    turns = [{"role": "user", "content": prompt}]
    turns += [{"role": "assistant", "content": answer} for answer in answers[:1]]
    rejected = {"role": "assistant", "content": answers[1]} if len(answers) > 1 else None
    return Record(tuple(turns), f"a.jsonl line {index}", rejected=rejected, **settings)


RECORDS = [
    record(1, "What?", "It is four."),
    record(2, "What?", "It is five."),
    record(3, "What?", "It is four."),
    record(4, "Who?"),
    record(5, "Wer?", "Grüße 🌊", "no"),
    record(6, "How long? " * 40, "Long."),
    record(7, "Cut", "It is", ended=False),
    replace(
        record(8, "Why?", "So."),
        messages=({"role": "user", "content": "Why?"},) * 1
        + ({"role": "assistant", "content": "So.", "reasoning_content": "Hm"},),
    ),
    record(9, "Where?", "Here<|im_end|> and there."),
]


@pytest.fixture(autouse=True)
def _kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(encoded, "CACHED_FROM", 1)
    monkeypatch.setattr(encoded, "BATCH", 4)
    monkeypatch.setattr(encoding, "BATCH", 4)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "encoded").glob("*.arrow"))


def test_kept_prompts_equal_those_encoded_anew(tmp_path, monkeypatch):
    expected, report = encode_all(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)
    first = encode_split(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)
    monkeypatch.setattr(encoded, "encode_batches", lambda *_: iter(()))
    moved = [replace(one, origin=one.origin.replace("a.jsonl", "b.jsonl")) for one in RECORDS]
    second = encode_split(moved, TOKENIZER, (END_ID,), *SETTINGS)
    for prompts, counts in (first, second):
        assert isinstance(prompts, EncodedPrompts)
        assert list(prompts) == expected
        assert list(prompts[1:3]) == expected[1:3]
        assert str(counts) == str(report)
    assert first[1] == report
    assert report.pairs == report.inner_ends == 1
    assert [prompt.origin for prompt in second[0]] == [one.origin.replace("a.", "b.") for one in expected]
    assert second[1].problems[0].startswith("b.jsonl line 8: the chat template"), "where the row lies now"
    assert Prompts(first[0])[0] == expected[0]
    assert len(files(tmp_path)) == 1


def test_whatever_the_encoding_depends_on_is_part_of_the_name(tmp_path):
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("assistant\n", "assistant:\n")
    plain = [RECORDS[0]]
    variants = [
        (plain, TOKENIZER, (END_ID,), True, None),
        ([replace(RECORDS[0], ended=False)], TOKENIZER, (END_ID,), True, None),
        ([RECORDS[1]], TOKENIZER, (END_ID,), True, None),
        (plain, tiny_tokenizer(300), (END_ID,), True, None),
        (plain, other, (END_ID,), True, None),
        (plain, TOKENIZER, (END_ID, 0), True, None),
        (plain, TOKENIZER, (END_ID,), False, None),
        (plain, TOKENIZER, (END_ID,), True, "Be kind"),
    ]
    for *content, chat, system in variants:
        encode_split(*content, chat, system, *SETTINGS[2:])
    assert len(files(tmp_path)) == len(variants)
    encode_split(plain, TOKENIZER, (END_ID,), True, None, 999, "error", "first", "stop")
    assert len(files(tmp_path)) == len(variants), "limits are applied to what is kept"


def test_a_damaged_file_is_encoded_anew(tmp_path, caplog):
    expected, _ = encode_split(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    for damaged in (content[:-9], b"", bytes(content[:700]) + bytes([content[700] ^ 1]) + bytes(content[701:])):
        file.unlink()
        file.write_bytes(damaged)
        caplog.clear()
        assert list(encode_split(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)[0]) == list(expected)
        assert "is damaged" in caplog.text
        assert file.read_bytes() == content


def test_a_folder_that_cant_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "encoded").write_text("a file")
    prompts, _ = encode_split(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)
    assert isinstance(prompts, list)
    assert "are not kept" in caplog.text


def test_the_files_that_were_not_used_for_the_longest_time_are_removed(tmp_path, monkeypatch):
    sets = [[one] for one in RECORDS[:3]]
    for age, records in enumerate(sets):
        encode_split(records, TOKENIZER, (END_ID,), *SETTINGS)
        newest = max(files(tmp_path), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (1000 + age, 1000 + age))
    encode_split(sets[0], TOKENIZER, (END_ID,), *SETTINGS)  # used again
    monkeypatch.setattr(encoded, "LARGEST_CACHE", 2.5 * newest.stat().st_size)
    encode_split([RECORDS[3]], TOKENIZER, (END_ID,), *SETTINGS)
    assert len(files(tmp_path)) == 2
    monkeypatch.setattr(encoded, "encode_batches", lambda *_: iter(()))
    assert len(encode_split(sets[0], TOKENIZER, (END_ID,), *SETTINGS)[0]) == 1


def test_errors_of_kept_records_are_those_of_records_encoded_anew():
    for settings in ((True, None, 64, "error", "all", "skip"), (True, None, 999, "error", "all", "stop")):
        errors = []
        for encode in (encode_all, encode_split, encode_split):
            with pytest.raises(DataError) as refusal:
                encode(RECORDS, TOKENIZER, (END_ID,), *settings)
            errors.append(str(refusal.value))
        assert len(set(errors)) == 1


def _encode(folder: str, queue) -> None:
    os.environ["DISTILLKIT_CACHE"] = folder
    encoded.CACHED_FROM = 1
    logging.getLogger("distillkit").setLevel(logging.INFO)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())
    logging.getLogger("distillkit").addHandler(handler)
    prompts, _ = encode_split(RECORDS, TOKENIZER, (END_ID,), *SETTINGS)
    queue.put((json.dumps([prompt.reference_ids for prompt in prompts]), lines))


def test_of_two_processes_one_encodes(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_encode, args=(str(tmp_path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0][0] == results[1][0]
    lines = [line for _, log in results for line in log]
    assert sum("encoded in" in line for line in lines) == 1
    assert sum("are read from" in line for line in lines) == 1

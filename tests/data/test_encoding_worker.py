"""Processes that encode: what they give is what this process would, and one that dies is an error in a line."""

from functools import partial

import pytest

from distillkit.data import encoding
from distillkit.data.encoding_worker import encode_in_processes
from distillkit.errors import DataError, ModelError
from distillkit.types import Record
from helpers.models import END_ID, tiny_tokenizer


def record(index: int) -> Record:
    turns = ({"role": "user", "content": f"Is it {index}?"}, {"role": "assistant", "content": "Yes."})
    return Record(turns, f"a.jsonl line {index}")


def test_processes_give_what_this_one_would_in_order(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 2)
    records = [record(index) for index in range(9)]
    question, answer = records[3].messages
    records[3] = Record((question, {**answer, "reasoning_content": "Hm"}), "a.jsonl line 3")
    settings = records, tiny_tokenizer(), (END_ID,), True, None

    def results():
        batches = encoding.encode_batches(*settings)
        return [str(one) if isinstance(one, DataError) else one for batch in batches for one in batch]

    expected = results()
    monkeypatch.setattr(encoding, "PROCESSES_FROM", 3)
    monkeypatch.setattr(encoding, "_num_cores", lambda: 1)
    assert results() == expected, "one core is too few"
    monkeypatch.setattr(encoding, "MIN_PROCESSES", 1)
    started = []
    monkeypatch.setattr(
        encoding, "encode_in_processes", lambda *call: started.append(call[2]) or encode_in_processes(*call)
    )
    assert results() == expected
    assert started == [1]
    assert isinstance(expected[3], str)


def test_results_come_in_the_order_of_the_batches():
    batches = [[index] * 9 for index in range(30)]
    assert list(encode_in_processes(list, iter(batches), 3)) == batches


def test_a_process_that_dies_is_named():
    with pytest.raises(DataError, match="A process that encodes the data ended with status 3"):
        list(encode_in_processes(partial(exec, "import os; os._exit(3)"), [{}], 1))


def test_an_error_in_a_process_is_raised_here():
    code = "from distillkit.errors import ModelError; raise ModelError('no template')"
    with pytest.raises(ModelError, match="no template"):
        list(encode_in_processes(partial(exec, code), [{}, {}, {}], 1))

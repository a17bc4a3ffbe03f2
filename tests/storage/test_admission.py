"""Responses at the store's door: what no later run could read is refused, and all that is sound is stored."""

from typing import Any

import pytest

from distillkit.errors import StoreError
from distillkit.storage.responses import ResponseStore
from distillkit.types import Prompt, Response
from helpers.stores import TEACHER, by_id, responses

LONE = "a \ud83d b"

BAD: list[tuple[dict[str, Any], str]] = [
    ({"log_probs": (None, -1.0, -1.0)}, r"log-probabilities are not all numbers \(\(None, -1\.0, -1\.0\)\)"),
    ({"log_probs": (float("nan"), -1.0, -1.0)}, "log-probabilities are not all finite and at most 0"),
    ({"log_probs": (-float("inf"), -1.0, -1.0)}, "log-probabilities are not all finite"),
    ({"log_probs": (-1e39, -1.0, -1.0)}, "log-probabilities are not all finite"),
    ({"log_probs": (0.5, -1.0, -1.0)}, "log-probabilities are not all finite and at most 0"),
    ({"log_probs": (-1.0, -1.0)}, "it has 2 log-probabilities and 3 tokens"),
    ({"log_probs": -1.0}, "log-probabilities are not all numbers"),
    ({"log_probs": (True, False, False)}, "log-probabilities are not all numbers"),
    ({"token_ids": 5}, r"token ids are not all integers \(5\)"),
    ({"token_ids": (-1,)}, r"token ids are not all in \[0, 2147483647\]"),
    ({"token_ids": (2**31,)}, r"token ids are not all in"),
    ({"token_ids": (2**70,)}, "token ids are not all integers"),
    ({"token_ids": (1.0,)}, "token ids are not all integers"),
    ({"token_ids": ("1",)}, "token ids are not all integers"),
    ({"token_ids": "123"}, "token ids are not all integers"),
    ({"token_ids": ((1, 2), (3,))}, "token ids are not all integers"),
    ({"token_ids": (1, None)}, "token ids are not all integers"),
    ({"token_ids": (True,)}, "token ids are not all integers"),
    ({"text": LONE}, "its text or its prompt's is not valid Unicode"),
    ({"text": None}, "its text or its prompt's is not valid Unicode"),
    ({"finish": "content_filter"}, "it ended neither by stop nor by length"),
    ({"pending": True}, "it ended neither by stop nor by length"),
]


@pytest.mark.parametrize(("values", "reason"), BAD, ids=[str(values)[:30] for values, _ in BAD])
def test_a_response_that_could_not_be_read_is_refused_and_all_others_are_stored(
    values: dict[str, Any], reason: str, tmp_path: Any
) -> None:
    good = responses(*(f"p{number}" for number in range(19)))
    bad = Response(**({"prompt_id": "bad", "token_ids": (1, 2, 3), "text": "x", "finish": "stop"} | values))
    words = (
        rf"1 of 20 responses by teacher can't be stored, such as the one to prompt 'bad': .*{reason}.* The other 19 are"
    )
    for write in (ResponseStore.write, ResponseStore.write_missing):
        store = ResponseStore(tmp_path / write.__name__)
        with pytest.raises(StoreError, match=words):
            write(store, TEACHER, [*good[:7], bad, *good[7:]])
        assert ResponseStore(tmp_path / write.__name__).read(TEACHER) == by_id(good)


def test_a_prompt_that_is_not_unicode_is_not_stored_and_neither_is_its_response(tmp_path: Any) -> None:
    prompts = [Prompt(name, ({"role": "user", "content": text},), (1,)) for name, text in (("a", "A?"), ("b", LONE))]
    with pytest.raises(StoreError, match=r"1 of 2 responses .* to prompt 'b': its text or its prompt's is not valid"):
        ResponseStore(tmp_path).write(TEACHER, responses("a", "b"), prompts)
    assert ResponseStore(tmp_path).read(TEACHER).keys() == {"a"}


@pytest.mark.parametrize("name", [None, ["a"], {"a": 1}, LONE], ids=repr)
def test_a_response_whose_prompt_id_is_no_text_is_refused_and_takes_no_other_with_it(name: Any, tmp_path: Any) -> None:
    bad = Response(name, (1,), "x", "stop")
    with pytest.raises(StoreError, match=r"1 of 2 responses .*its text or its prompt's is not valid"):
        ResponseStore(tmp_path).write(TEACHER, [bad, *responses("a")])
    assert ResponseStore(tmp_path).read(TEACHER).keys() == {"a"}


@pytest.mark.parametrize("log_probs", [(), (0.0, -0.0, -1e30), (1e-6, -1.0, -2.0), (-1, 0, -2)])
def test_log_probabilities_of_any_size_are_stored_also_those_above_0_by_rounding(
    log_probs: tuple[float, ...], tmp_path: Any
) -> None:
    ResponseStore(tmp_path).write(TEACHER, [Response("a", (1, 2, 3), "x", "stop", log_probs)])
    assert ResponseStore(tmp_path).read(TEACHER)["a"].log_probs == pytest.approx(log_probs, rel=1e-6)


def test_nothing_is_written_if_all_are_bad(tmp_path: Any) -> None:
    with pytest.raises(StoreError, match="1 of 1 responses"):
        ResponseStore(tmp_path).write(TEACHER, [Response("a", (-1,), "x", "stop")])
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_stores_in_the_meantime_is_left_out(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in step: each has seen that a response is missing, and the other is the first to store it."""
    one, other = ResponseStore(tmp_path), ResponseStore(tmp_path)
    lock = one.folder.lock

    def overtaken(name: str) -> Any:
        monkeypatch.setattr(one.folder, "lock", lock)
        other.write(TEACHER, responses("a"))
        return lock(name)

    monkeypatch.setattr(one.folder, "lock", overtaken)
    assert one.write_missing(TEACHER, responses("a", "bb")) == 1
    assert one.write_missing(TEACHER, responses("a", "bb")) == 0
    assert ResponseStore(tmp_path).read(TEACHER) == by_id(responses("a", "bb"))
    assert sum(shard["responses"] for shard in ResponseStore(tmp_path).shards()) == 2

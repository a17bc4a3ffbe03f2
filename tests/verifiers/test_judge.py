"""A judge behind a real server on loopback."""

import threading

import pytest

from distillkit.errors import ConfigError, DataError, ServerError
from distillkit.testing import check_verifier
from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.judge import PairwiseJudge, read_verdict
from helpers.servers import Reply, chat, serving


def prompts_of(*references):
    turns = [({"role": "user", "content": f"Task {i}"},) for i in range(len(references))]
    asked = zip(turns, references, strict=True)
    return Prompts(tuple(Prompt(str(i), turn, (1,), reference=own) for i, (turn, own) in enumerate(asked)))


def responses_of(*texts):
    return [Response(str(i), (1,), text, "stop") for i, text in enumerate(texts)]


def shown(request):
    """Both answers, in the order in which they were shown."""
    a, _, b = request.question.partition("[Answer A]\n")[2].partition("\n\n[Answer B]\n")
    return a, b.partition("\n\nReply")[0]


def longer(request):
    a, b = shown(request)
    return chat("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B", model="judge")


def judge(server, **settings):
    return PairwiseJudge(server.url, "judge", **{"concurrency": 2, "retries": 0} | settings)


def test_a_response_is_judged_by_how_often_it_is_preferred():
    with serving(longer, served=("judge",)) as server:
        found = judge(server).verify(
            prompts_of("short", "quite long", "same"), responses_of("much longer", "no", "also")
        )
    assert found == [1.0, 0.0, 0.5]


def test_both_orders_are_asked_so_that_a_preference_for_a_place_is_a_tie():
    seen = []

    def first(request):
        seen.append(shown(request))
        return chat("A", model="judge")

    with serving(first, served=("judge",)) as server:
        assert judge(server).verify(prompts_of("reference"), responses_of("student")) == [0.5]
    assert sorted(seen) == [("reference", "student"), ("student", "reference")]
    assert all("user: Task 0" in request.question for request in server.requests)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 0.0),
        ("Answer B.", 0.0),
        ("**b**", 0.0),
        ("tie", 0.5),
        ("Tie!", 0.5),
        ("A is better", 1.0),
    ],
)
def test_verdicts_are_read_as_judges_write_them(text, expected):
    def once(request):
        return chat(text if shown(request)[0] == "student" else "tie", model="judge")

    with serving(once, served=("judge",)) as server:
        assert judge(server).verify(prompts_of("reference"), responses_of("student")) == [(expected + 0.5) / 2]


VERDICTS = {
    "A better answer is B": "b",
    "A better answer is B.": "b",
    "A": "a",
    "b": "b",
    "a.": "a",
    "[[B]]": "b",
    "Verdict: [[A]]": "a",
    "**Answer B**": "b",
    "My verdict is B.": "b",
    "The winner is A!": "a",
    "A tie": "tie",
    "A tie.": "tie",
    "It is a tie.": "tie",
    "A is better than B.": "a",
    "A is slightly better": "a",
    "B is the best answer.": "b",
    "**B** is much better.": "b",
    "Answer A is clearly superior to answer B": "a",
    "B wins": "b",
    "I prefer A to B": "a",
    "I choose answer B.": "b",
    "The best response is A": "a",
    "A: it is more correct": "a",
    "B\n\nIt is shorter.": "b",
    "<think>A is better? No.</think>B": "b",
    # Not a verdict, or two.
    "A good answer should be short.": None,
    "A and B are both fine": None,
    "A or B?": None,
    "A, B": None,
    "A is better. No, B is better.": None,
    "A is not better": None,
    "Both have merits": None,
    "a better one would be shorter": None,
    "<think>A is better": None,
    "Neither A nor B": None,
    "A is worse than B": None,
    "": None,
}


@pytest.mark.parametrize("text", VERDICTS)
def test_a_verdict_is_stated_and_not_only_mentioned(text):
    assert read_verdict(text) == VERDICTS[text]


def test_what_is_no_verdict_is_counted_as_a_tie_and_said(caplog):
    with serving(lambda request: chat("Both have merits.", model="judge"), served=("judge",)) as server:
        assert judge(server).verify(prompts_of("a", "b"), responses_of("c", "d")) == [0.5, 0.5]
    assert "4 of 4 replies of the judge judge contain no verdict; they count as ties" in caplog.text


def test_texts_that_look_like_places_are_shown_as_they_are():
    seen = []

    def note(request):
        seen.append(shown(request))
        return chat("tie", model="judge")

    with serving(note, served=("judge",)) as server:
        judge(server, concurrency=1).verify(prompts_of("{a} {task}"), responses_of("{b}"))
    assert seen == [("{b}", "{a} {task}"), ("{a} {task}", "{b}")]


def test_a_failure_that_passes_is_tried_again_and_one_that_stays_ends_it():
    lock, calls = threading.Lock(), []

    def first_fails(request):
        with lock:
            calls.append(1)
            number = len(calls)
        return Reply({"error": "busy"}, 503, {"retry-after": "0"}) if number == 1 else longer(request)

    with serving(first_fails, served=("judge",)) as server:
        assert judge(server, retries=2).verify(prompts_of("s"), responses_of("longer")) == [1.0]
    with (
        serving(lambda request: Reply({"error": "gone"}, 500), served=("judge",)) as server,
        pytest.raises(ServerError, match="failed after 1 try"),
    ):
        judge(server).verify(prompts_of("a", "b"), responses_of("c", "d"))


def test_the_key_comes_from_the_environment_alone(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "a-secret-of-the-judge")
    with serving(longer, served=("judge",)) as server:
        own = judge(server, key_variable="JUDGE_API_KEY")
        own.verify(prompts_of("s"), responses_of("longer"))
    assert "a-secret-of-the-judge" not in str(vars(own))
    keys = {request.headers.get("authorization") for request in server.requests}
    assert keys == {"Bearer a-secret-of-the-judge"}


def test_it_keeps_the_contract():
    with serving(longer, served=("judge",)) as server:
        check_verifier(judge(server))


def test_a_prompt_without_a_response_is_refused():
    with pytest.raises(
        DataError, match="PairwiseJudge compares with the response in the data, and prompt 'Task 0' has none"
    ):
        PairwiseJudge("http://127.0.0.1:1/v1", "judge").check(prompts_of(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://key@host/v1"}, r"PairwiseJudge\.url must contain neither user"),
        ({"concurrency": 0}, r"PairwiseJudge\.concurrency must be at least 1, got 0"),
        ({"retries": -1}, r"PairwiseJudge\.retries must be at least 0, got -1"),
        ({"timeout": 0}, r"PairwiseJudge\.timeout must be above 0 s, got 0"),
        ({"question": "Is {a} better?"}, r"PairwiseJudge\.question lacks \{task\}, \{b\}"),
        ({"key_variable": "sk-123"}, r"PairwiseJudge\.key_variable"),
    ],
)
def test_a_setting_that_is_wrong_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PairwiseJudge(**{"url": "http://127.0.0.1:1/v1", "model": "judge"} | settings)

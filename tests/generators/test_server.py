import time

import pytest

from distillkit.data.chat import encode
from distillkit.errors import GenerationError, ModelError
from distillkit.generators.server import ServerGenerator
from distillkit.types import Prompts, Record, Response, Sampling
from helpers.models import END_ID, tiny_tokenizer
from helpers.served import SAMPLING, TOKENIZER, prompts_of, ready, user
from helpers.servers import chat, completion, echo, first, serving


def as_in_the_data(question, answer, chat=True):
    """The tokens of an answer that came with its prompt: another way through the code that makes rows."""
    turns = (user(question), {"role": "assistant", "content": answer})
    found = encode(Record(turns, "here"), TOKENIZER, (END_ID,), chat=chat)
    return tuple(i for i, own in zip(found.reference_ids, found.reference_mask, strict=True) if own)


HARD = ("Hello", " leading", "trailing \n", "", "Grüße, 世界 🌊 ñ", "two\nlines\n\n", "a<b>&\"'")


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answer", [text for text in HARD if text])
@pytest.mark.parametrize("chat_data", [True, False], ids=["chat", "plain"])
def test_a_text_becomes_the_tokens_that_it_has_where_it_comes_with_the_prompt(answer, chat_data):
    with serving(lambda _: chat(answer)) as server:
        found = ready(server.url).generate(prompts_of("Hello there?", chat=chat_data), SAMPLING)
    assert found[0].token_ids == as_in_the_data("Hello there?", answer, chat_data)
    # Plain text and its response are one text, whose spaces count.
    assert (found[0].text, found[0].finish) == (answer.strip() if chat_data else answer, "stop")
    assert found[0].token_ids[-1] == END_ID
    assert TOKENIZER.decode(found[0].token_ids[:-1]) == answer


@pytest.mark.parametrize("answer", HARD)
@pytest.mark.parametrize("chat_data", [True, False], ids=["chat", "plain"])
def test_an_answer_that_was_cut_has_no_end_of_turn(answer, chat_data):
    with serving(lambda _: chat(answer, "length")) as server:
        found = ready(server.url).generate(prompts_of("Hello there?", chat=chat_data), SAMPLING)[0]
    assert found.finish == "length"
    assert TOKENIZER.decode(found.token_ids) == answer
    assert END_ID not in found.token_ids


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("Four.", "stop", "<think>\nTwo, two.\n</think>\n\nFour."),
        ("Fo", "length", "<think>\nTwo, two.\n</think>\n\nFo"),
        (None, "length", "<think>\nTwo, two."),
    ],
)
def test_reasoning_that_a_server_sends_apart_is_a_part_of_the_response(name, text, finish, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    reply = chat(text, finish)
    reply.content["choices"][0]["message"][name] = "Two, two."
    prompt = encode(Record((user("Two?"),), "line 1"), tokenizer, (END_ID,), chat=True)
    with serving(lambda _: reply) as server:
        generator = ready(server.url)
        generator.refresh(None, tokenizer)
        response = generator.generate(Prompts((prompt,)), SAMPLING)[0]
    assert (response.text, response.finish) == (expected, finish)
    assert tokenizer.decode(response.token_ids) == expected + "<|im_end|>" * (finish == "stop")


def test_answers_are_in_the_prompts_order_whichever_comes_first():
    questions = [f"Question {number}" for number in range(12)]

    def later_ones_first(request):
        time.sleep(0.02 * (12 - int(request.question.split()[-1])) / 4)
        return echo(request)

    with serving(later_ones_first) as server:
        found = ready(server.url).generate(prompts_of(*questions), SAMPLING)
    assert [response.text for response in found] == [f"You ask: {question}" for question in questions]
    assert [response.prompt_id for response in found] == [prompt.id for prompt in prompts_of(*questions)]


def test_what_is_longer_in_the_runs_tokens_than_asked_for_is_cut():
    with serving(lambda _: chat("The sea is wide and it is very deep")) as server:
        found = ready(server.url).generate(prompts_of("Sea?"), Sampling(max_new_tokens=5))[0]
    assert found.token_ids == as_in_the_data("Sea?", "The sea is wide and it is very deep")[:5]
    assert (found.finish, found.text) == ("length", TOKENIZER.decode(found.token_ids))


@pytest.mark.parametrize(
    ("reply", "expected", "said"),
    [
        (chat("", "stop"), ((END_ID,), "stop"), "1 with finish_reason stop"),
        (chat(None, "stop"), ((END_ID,), "stop"), "1 with finish_reason stop"),
        (chat("", "length"), ((), "length"), "1 with finish_reason length"),
        (chat("Half of some", "content_filter"), ((), "length"), "1 with finish_reason content_filter"),
    ],
    ids=["empty", "null", "nothing before the end", "filtered"],
)
def test_an_empty_answer_is_what_it_is_and_is_counted(reply, expected, said, caplog):
    with serving(lambda request: reply if request.number == 0 else echo(request)) as server:
        found = ready(server.url, concurrency=1).generate(prompts_of("a", "b"), SAMPLING)
    assert (found[0].token_ids, found[0].finish, found[0].text) == (*expected, "")
    assert found[1].text == "You ask: b"
    assert f"1 of 2 responses of the server are empty: {said}" in caplog.text


def test_the_servers_tokens_and_log_probabilities_are_taken_as_they_are():
    ids = (*TOKENIZER("The sea is wide", add_special_tokens=False)["input_ids"], END_ID)
    logs = [-0.5] * len(ids)

    def tell(request):
        assert request.path == "/v1/completions"
        return completion("The sea is wide", token_ids=list(ids), logprobs={"token_logprobs": logs})

    prompts = prompts_of("Sea?")
    with serving(tell, owner="vllm") as server:
        found = ready(server.url, api="completions").generate(prompts, SAMPLING)
    assert found == [Response(prompts[0].id, ids, "The sea is wide", "stop", tuple(logs))]
    body = server.requests[0].body
    assert body["prompt"] == list(prompts[0].input_ids)
    assert (body["return_token_ids"], body["logprobs"], body["stop_token_ids"]) == (True, 0, [END_ID])


def test_text_serves_where_a_server_of_completions_tells_no_tokens():
    with serving(lambda _: completion("The sea")) as server:
        found = ready(server.url, api="completions").generate(prompts_of("Sea?"), SAMPLING)[0]
    assert found == Response(found.prompt_id, as_in_the_data("Sea?", "The sea"), "The sea", "stop")
    assert "return_token_ids" not in server.requests[0].body


@pytest.mark.parametrize("ids", [[5000], [40, 41, 42]], ids=["none of ours", "other words"])
def test_tokens_of_another_tokenizer_are_refused(ids):
    with (
        serving(lambda _: completion("The sea is wide", token_ids=ids)) as server,
        pytest.raises((ModelError, GenerationError), match=r"ids that are not those of the run's .*\.api to chat\."),
    ):
        ready(server.url, api="completions").generate(prompts_of("Sea?"), SAMPLING)


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sampling_and_a_seed_for_each_prompt_are_sent():
    prompts = prompts_of("a", "b")
    with serving() as server:
        ready(server.url, concurrency=1).generate(prompts, SAMPLING)
        ready(server.url, concurrency=1).generate(prompts[1:], SAMPLING)
        ready(server.url).generate(prompts[1:].at_round(3), SAMPLING)
    bodies = [request.body for request in server.requests]
    assert bodies[0].keys() == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    assert {key: bodies[0][key] for key in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "strong",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 200,
    }
    assert bodies[0]["messages"] == [{"role": "user", "content": "a"}]
    seeds = [body["seed"] for body in bodies]
    assert seeds[1] == seeds[2] == SAMPLING.seed_of(2, prompts[1].id) >> 32
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("owner", "top_k", "sent"), [("openai", 0, None), ("openai", 20, 20), ("vllm", 0, 0)])
def test_top_k_is_sent_where_it_is_set_or_the_server_would_take_the_models_own(owner, top_k, sent):
    with serving(owner=owner) as server:
        ready(server.url).generate(prompts_of("a"), Sampling(top_k=top_k))
    body = server.requests[0].body
    assert body.get("top_k") == sent
    assert ("repetition_penalty" in body) == (owner == "vllm")


def test_extra_keys_are_sent_and_the_name_of_the_length_can_be_another():
    with serving() as server:
        generator = ready(server.url, extra={"service_tier": "flex"}, length_key="max_completion_tokens")
        generator.generate(prompts_of("a"), SAMPLING)
    body = server.requests[0].body
    assert (body["service_tier"], body["max_completion_tokens"], "max_tokens" in body) == ("flex", 200, False)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_than_allowed_are_made_at_once(most):
    def slowly(request):
        time.sleep(0.02)
        return echo(request)

    with serving(slowly) as server:
        ready(server.url, concurrency=most).generate(prompts_of(*map(str, range(9))), SAMPLING)
    assert server.most_at_once == most


def test_the_identity_holds_what_answers_depend_on_and_not_where_the_server_is():
    one, moved = ServerGenerator("http://a/v1", "m"), ServerGenerator("https://b:99/v2", "m", timeout=3, concurrency=1)
    assert one.identity() == moved.identity() == "server:m:chat"
    others = {
        ServerGenerator("http://a/v1", "m", **settings).identity()
        for settings in (
            {"api": "completions"},
            {"extra": {"min_p": 0.1}},
            {"extra": {"min_p": 0.2}},
        )
    } | {one.identity(), ServerGenerator("http://a/v1", "n").identity()}
    assert len(others) == 5


# ── another model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_of_another_model_is_refused_before_it_is_asked():
    with (
        serving(served=("weak", "weaker")) as server,
        pytest.raises(
            GenerationError,
            match=r"serves weak, weaker, but ServerGenerator.model is strong. Set ServerGenerator.model to a model",
        ),
    ):
        ready(server.url).generate(prompts_of("a"), SAMPLING)
    assert server.requests == []


@pytest.mark.parametrize("named", ["weak", "strong-mini", "strong-2", "strongest"])
def test_an_answer_of_another_model_is_refused_and_not_asked_for_again(named):
    behaviour = first(1, lambda: chat("x", model=named))
    with serving(behaviour) as server:
        generator = ready(server.url, model="strong")
        if named == "strong-2":  # a dated name of the same model
            assert generator.generate(prompts_of("a"), SAMPLING)[0].text == "x"
            return
        with pytest.raises(GenerationError, match=rf"with the model {named}, but ServerGenerator.model is strong"):
            generator.generate(prompts_of("a"), SAMPLING)
    assert len(server.requests) == 1


def test_a_server_without_a_list_of_models_is_taken_by_its_answers():
    with serving(served=None) as server:
        assert ready(server.url).generate(prompts_of("a"), SAMPLING)[0].text == "You ask: a"
    with (
        serving(lambda _: chat("x", model="weak"), served=None) as server,
        pytest.raises(GenerationError, match="weak"),
    ):
        ready(server.url).generate(prompts_of("a"), SAMPLING)


# ── answers that can't be used ────────────────────────────────────────────────────────────────────────────────────────

BAD_CHOICES = {
    "an id that is none": {"token_ids": [-1]},
    "a number for ids": {"token_ids": 5},
    "a truth value for an id": {"token_ids": [True]},
    "a fraction for an id": {"token_ids": [1.5]},
    "no first log-probability": {"logprobs": {"token_logprobs": [None, -1.0]}},
    "a positive log-probability": {"logprobs": {"token_logprobs": [0.5, -1.0]}},
    "not a number": {"logprobs": {"token_logprobs": [float("nan"), -1.0]}},
    "infinite": {"logprobs": {"token_logprobs": [float("-inf"), -1.0]}},
    "text for log-probabilities": {"logprobs": {"token_logprobs": "none"}},
    "half a character": {"text": "a \ud83d b"},
}


@pytest.mark.parametrize("name", BAD_CHOICES)
@pytest.mark.parametrize("bad", [{3}, {2, 3, 4}], ids=["once", "each time"])
def test_a_bad_answer_is_asked_for_again_and_takes_no_other_with_it(name, bad):
    ids = TOKENIZER("good", add_special_tokens=False).input_ids[:2]
    good = {"text": TOKENIZER.decode(ids), "token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}

    def behave(request):
        return completion(finish="stop", **(good | BAD_CHOICES[name] if request.number in bad else good))

    prompts = prompts_of(*"abcd", chat=False)
    with serving(behave, owner="vllm") as server:
        generator = ready(server.url, api="completions", concurrency=1)
        if len(bad) == 1:
            responses = generator.generate(prompts, SAMPLING)
        else:
            with pytest.raises(GenerationError, match=r"2 of 4 responses were received and saved") as caught:
                generator.generate(prompts, SAMPLING)
            responses = caught.value.finished
    assert [response.token_ids for response in responses] == [tuple(ids)] * (4 if len(bad) == 1 else 2)
    assert len(server.requests) == 5

"""Answers of a server: each is taken, or refused with one line."""

import json
import random
from typing import Any

from distillkit.errors import ServerError
from distillkit.generators.server import ServerGenerator, _owners
from distillkit.remote.http import TransientError, _retry_after
from distillkit.types import Sampling
from distillkit.verifiers.judge import _verdict
from helpers.fuzzing import any_value, fuzz, mutated
from helpers.served import prompts_of, ready

PROMPT = prompts_of("a")[0]


def answer(rng: random.Random) -> Any:
    """An answer of `/completions` with one or two of its values replaced, or its bytes changed."""
    choice: dict[str, Any] = {
        "text": "good",
        "message": {"content": "good"},
        "finish_reason": "stop",
        "token_ids": [40, 41],
        "logprobs": {"token_logprobs": [-0.5, -1.0]},
    }
    content: dict[str, Any] = {"model": "strong", "choices": [choice]}
    for _ in range(rng.randint(1, 2)):
        holder = rng.choice([content, choice, choice, choice["message"], choice["logprobs"]])
        if isinstance(holder, dict) and holder:
            holder[rng.choice(list(holder))] = any_value(rng)
    for name in ("token_ids", "logprobs", "message"):
        if not isinstance(choice[name], list | dict):
            choice[name] = choice[name] if rng.random() < 0.5 else any_value(rng)
    try:
        return json.loads(mutated(json.dumps(content).encode(), rng)) if rng.random() < 0.3 else content
    except (ValueError, RecursionError):
        return content


def test_answers_of_both_interfaces():
    generators = [ready("http://127.0.0.1:1/v1", api=api) for api in ("completions", "chat")]

    def run(value: Any) -> None:
        for generator in generators:
            read(generator, value)

    outcome = fuzz("answers", answer, run)
    assert outcome.accepted > 0
    assert outcome.refused["ServerError"] > 0


def read(generator: ServerGenerator, value: Any) -> None:
    try:
        if not isinstance(value, dict):
            return
        completion = generator._read(value)
    except TransientError as error:  # the client makes one line of it
        raise ServerError(str(error)) from error
    response = generator._response(PROMPT, completion, Sampling(max_new_tokens=5))
    response.text.encode()
    assert all(type(token_id) is int and token_id >= 0 for token_id in response.token_ids)
    assert all(value <= 0 for value in response.log_probs)


def test_lists_of_models_verdicts_and_waits():
    def run(value: Any) -> None:
        for parse in (_owners, _verdict):
            try:
                parse(value if isinstance(value, dict) else {"data": value, "choices": value})
            except TransientError as error:
                str(error).encode()
        wait = _retry_after(str(value))
        assert wait is None or 0 <= wait < float("inf")

    fuzz("lists and verdicts", answer, run)
    fuzz("values", any_value, run)

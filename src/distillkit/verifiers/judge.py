"""Judging a response by another model, against the response that came with the prompt."""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distillkit.client import Client, PassingError, StoppedError, check_url, check_variable
from distillkit.errors import ConfigError, DataError, ServerError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response

_log = logging.getLogger(__name__)

QUESTION = """\
Two assistants were given the same task. Say which answer is better: more correct, more to the point, easier to read. \
The order in which they are shown has no meaning, and neither has their length.

[Task]
{task}

[Answer A]
{a}

[Answer B]
{b}

Reply with one word: A, B, or tie."""
_VERDICT = re.compile(r"\W*\b(?:answer\s+)?(a|b|tie)\b", re.IGNORECASE)
_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}


class PairwiseJudge(Verifier):
    """How often a model prefers a response to the one that came with the prompt: 1 always, 0 never, ½ for a tie.

    Each pair is judged in both orders, because judges prefer a place (Zheng et al. 2023, arXiv 2306.05685, section 3),
    at temperature 0 by a server that speaks the OpenAI protocol. A verdict that is none of the three counts as a tie,
    and the log says how many there were.

    Args:
        url: Where the protocol begins, such as `http://127.0.0.1:8000/v1`.
        model: The judge's name on the server.
        key_variable: Name of the environment variable with the server's key; None sends none.
        concurrency: Most requests at once, at least 1.
        timeout: Seconds within which an answer must be complete, above 0.
        retries: How often a request is tried again that failed in a way that may pass, at least 0.
        question: What the judge is asked, with `{task}`, `{a}` and `{b}`; None is a question of our own.

    Raises:
        ConfigError: If a number is out of range, the URL holds a secret or is none, `key_variable` is no name, or
            `question` lacks one of its places.
    """

    needs_reference = True

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        question: str | None = None,
    ) -> None:
        check_url(url, "PairwiseJudge.url")
        check_variable(key_variable, "PairwiseJudge.key_variable")
        for name, number, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if number < least:
                raise ConfigError(f"PairwiseJudge.{name} must be at least {least}, got {number}.")
        if not timeout > 0:
            raise ConfigError(f"PairwiseJudge.timeout must be above 0 s, got {timeout}.")
        self.question = QUESTION if question is None else question
        lacking = [place for place in ("{task}", "{a}", "{b}") if place not in self.question]
        if lacking:
            raise ConfigError(f"PairwiseJudge.question lacks {', '.join(lacking)}: the judge must see all three.")
        self.url, self.model, self.key_variable = url, model, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries

    def check(self, prompts: Prompts) -> None:
        """Refuses prompts without a response of their own.

        Raises:
            DataError: If one has none.
        """
        for prompt in prompts:
            if prompt.reference is None:
                raise DataError(
                    f"PairwiseJudge compares with the data's response, and prompt "
                    f"{prompt.messages[-1]['content'][:60]!r} has none: add a response column, or use another verifier."
                )

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0, ¼, ½, ¾ or 1 for each response.

        Raises:
            DataError: If a prompt has no response of its own.
            ServerError: If the server had to be given up.
        """
        self.check(prompts)
        questions = []
        for prompt, response in zip(prompts, responses, strict=True):
            task = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.messages)
            own, other = response.text, prompt.reference or ""
            questions += [self._question(task, own, other), self._question(task, other, own)]
        verdicts = self._ask_all(questions)
        unread = sum(verdict is None for verdict in verdicts)
        if unread:
            _log.warning("%s gave no verdict %d of %d times: these count as ties", self.model, unread, len(verdicts))
        scores = [0.5 if verdict is None else _SCORES[verdict] for verdict in verdicts]
        return [(scores[place] + 1.0 - scores[place + 1]) / 2 for place in range(0, len(scores), 2)]

    def _question(self, task: str, a: str, b: str) -> str:
        parts = {"{task}": task, "{a}": a, "{b}": b}
        return re.sub(r"\{task\}|\{a\}|\{b\}", lambda found: parts[found[0]], self.question)

    def _ask_all(self, questions: Sequence[str]) -> list[str | None]:
        if not questions:
            return []
        client = Client(self.url, self.key_variable, self.timeout, self.retries, 1.0, 300.0, self.concurrency)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, client, question) for question in questions]
            try:
                failures = [error for future in futures if (error := future.exception()) is not None]
            except BaseException:  # an interrupt must not wait for all that has not been asked yet
                client.stop()
                raise
        if failures:
            raise next((error for error in failures if not isinstance(error, StoppedError)), failures[0])
        return [future.result() for future in futures]

    def _ask(self, client: Client, question: str) -> str | None:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0.0,
            "max_tokens": 16,
        }  # fmt: skip
        try:
            return client.ask("/chat/completions", body, _verdict)
        except ServerError:
            client.stop()
            raise


def _verdict(answer: dict[str, Any]) -> str | None:
    """`a`, `b` or `tie`; None if the judge says something else."""
    try:
        text = answer["choices"][0]["message"]["content"] or ""
        found = _VERDICT.match(text)
    except (KeyError, IndexError, TypeError) as error:
        raise PassingError("an answer without a choice and its text") from error
    return None if found is None else found[1].lower()

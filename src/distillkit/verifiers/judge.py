"""LLM judge: another model compares the response with the reference response in the data."""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distillkit.errors import ConfigError, DataError, ServerError
from distillkit.interfaces import Verifier
from distillkit.remote.http import Client, StoppedError, TransientError, check_url, check_variable
from distillkit.types import Prompts, Response
from distillkit.verifiers.final_answer import final_answer

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
_NAME = r"(?i:(?:the\s+)?(?:answer|assistant|response|option)\s+)?[*\"'(\[]*(?P<verdict>A|B|[Tt]ie)\b"
_ONLY_VERDICT = re.compile(
    r"\W*+(?:(?:my|the|final)\s++)*+(?:verdict|winner|answer|assistant|response|option)?(?:\s++is)?\W*+(?:a\s++)?"
    r"(a|b|tie)\W*+",
    re.IGNORECASE,
)
# Capital letters alone: in a sentence, `a` is a word, and so is `A` at its start.
_STATEMENTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\A\W*{_NAME}\W*?(?:[.:;,)\-–—]\s(?!\s*(?:and|or|A|B)\b)|\n)",
        rf"(?<!\bnot\s)\b{_NAME}[*\"')\]]*\s+(?:is|was|seems|wins\b)\s*(?:(?:clearly|slightly|much|far|the|a|bit|even)\s+)*"
        r"(?:better|best|superior|preferable|stronger|winner|(?<=wins)\b)",
        rf"\b(?i:(?:better|best|preferred|superior|stronger|winning)(?:\s+\w+)?\s+is|verdict(?:\s+is)?|winner(?:\s+is)?)\W+{_NAME}",
        rf"\b(?i:prefer|choose|pick|select|vote\s+for)\s+{_NAME}",
        r"\b(?i:it\s+is|it's|call\s+it|this\s+is)\s+a\s+(?P<verdict>tie)\b",
        r"\[\[(?P<verdict>A|B|[Tt]ie)\]\]",
    )
)
_LONGEST_REPLY = 1000
"""Characters of a reply that are read; it has at most `max_tokens` of 16."""
_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5}


class PairwiseJudge(Verifier):
    """Preference of a judge model for the response over the reference response: 1 win, 0 loss, ½ tie.

    Each pair is judged in both orders and averaged, because judges have a position bias (Zheng et al. 2023, arXiv
    2306.05685, section 3). The judge runs at temperature 0 on a server with an OpenAI-compatible API. A reply that
    contains no verdict counts as a tie, and the log reports how many there were.

    Args:
        url: Base URL of the API, such as `http://127.0.0.1:8000/v1`.
        model: Name of the judge model on the server.
        key_variable: Name of the environment variable that holds the API key; None sends no key.
        concurrency: Maximum number of simultaneous requests, at least 1.
        timeout: Seconds within which a response must be complete, above 0.
        retries: Number of retries after a transient failure, at least 0.
        question: Prompt for the judge, with the placeholders `{task}`, `{a}` and `{b}`; None uses the built-in one.

    Raises:
        ConfigError: If a number is out of range, the URL is invalid or contains a secret, `key_variable` is not a valid
            name, or `question` lacks a placeholder.
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
        for name, value, minimum in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < minimum:
                raise ConfigError(f"PairwiseJudge.{name} must be at least {minimum}, got {value}.")
        if not timeout > 0:
            raise ConfigError(f"PairwiseJudge.timeout must be above 0 s, got {timeout}.")
        self.question = QUESTION if question is None else question
        missing = [placeholder for placeholder in ("{task}", "{a}", "{b}") if placeholder not in self.question]
        if missing:
            raise ConfigError(
                f"PairwiseJudge.question lacks {', '.join(missing)}: add it, since the judge must see the task and "
                "both answers."
            )
        self.url, self.model, self.key_variable = url, model, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries

    def check(self, prompts: Prompts) -> None:
        """Checks that every prompt has a reference response.

        Raises:
            DataError: If a prompt has none.
        """
        for prompt in prompts:
            if prompt.reference is None:
                raise DataError(
                    f"PairwiseJudge compares with the response in the data, and prompt "
                    f"{prompt.messages[-1]['content'][:60]!r} has none: add a response column, or use another verifier."
                )

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0, ¼, ½, ¾ or 1 for each response.

        Raises:
            DataError: If a prompt has no reference response.
            ServerError: If a request failed for good.
        """
        self.check(prompts)
        questions = []
        for prompt, response in zip(prompts, responses, strict=True):
            task = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.messages)
            reference = prompt.reference or ""
            questions += [
                self._question(task, response.text, reference),
                self._question(task, reference, response.text),
            ]
        verdicts = self._request_verdicts(questions)
        missing = sum(verdict is None for verdict in verdicts)
        if missing:
            _log.warning(
                "%d of %d replies of the judge %s contain no verdict; they count as ties",
                missing,
                len(verdicts),
                self.model,
            )
        scores = [0.5 if verdict is None else _SCORES[verdict] for verdict in verdicts]
        return [(scores[index] + 1.0 - scores[index + 1]) / 2 for index in range(0, len(scores), 2)]

    def _question(self, task: str, a: str, b: str) -> str:
        values = {"{task}": task, "{a}": a, "{b}": b}
        return re.sub(r"\{task\}|\{a\}|\{b\}", lambda match: values[match[0]], self.question)

    def _request_verdicts(self, questions: Sequence[str]) -> list[str | None]:
        if not questions:
            return []
        client = Client(self.url, self.key_variable, self.timeout, self.retries, 1.0, 300.0, self.concurrency)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._request_verdict, client, question) for question in questions]
            try:
                failures = [error for future in futures if (error := future.exception()) is not None]
            except BaseException as error:
                # An interrupt must not wait for requests, neither for those that are under way.
                (client.stop if isinstance(error, Exception) else client.abort)()
                raise
        if failures:
            raise next((error for error in failures if not isinstance(error, StoppedError)), failures[0])
        return [future.result() for future in futures]

    def _request_verdict(self, client: Client, question: str) -> str | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": 16,
        }
        try:
            return client.request("/chat/completions", body, _verdict)
        except ServerError:
            client.stop()
            raise


def _verdict(reply: dict[str, Any]) -> str | None:
    """The verdict in a reply: `a`, `b` or `tie`; None if it contains no verdict."""
    try:
        text = reply["choices"][0]["message"]["content"] or ""
        return read_verdict(text)
    except (KeyError, IndexError, TypeError) as error:
        raise TransientError("a response without a choice and its text") from error


def read_verdict(text: str) -> str | None:
    """The verdict of a judge: `a`, `b` or `tie`; None if the text states none, or states different ones.

    A verdict is the whole text, its first word before punctuation, or a statement such as "B is better", "I prefer A",
    "the better answer is B" and "[[A]]". A letter that is only mentioned is none: not the article in "A better answer".
    """
    text = final_answer(text).strip()[:_LONGEST_REPLY]
    only = _ONLY_VERDICT.fullmatch(text)
    if only is not None:
        return only[1].lower()
    verdicts = {match["verdict"].lower() for pattern in _STATEMENTS for match in pattern.finditer(text)}
    return verdicts.pop() if len(verdicts) == 1 else None

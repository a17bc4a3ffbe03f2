"""A generator that is a server which speaks the OpenAI protocol."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distillkit.client import Client, MissingError, PassingError, StoppedError, check_url, check_variable
from distillkit.errors import ConfigError, DistillKitError, GenerationError, ModelError
from distillkit.generators.progress import token_bar
from distillkit.generators.texts import as_response
from distillkit.interfaces import Generator
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Response, Sampling

_log = logging.getLogger(__name__)

_OURS = {
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "n",
    "stream",
}  # fmt: skip
_FINISHES = ("stop", "length", "content_filter")
_VLLM = {"repetition_penalty": 1.0, "min_p": 0.0}
"""What vLLM would take from the model's generation config where a request leaves it out, besides top-k."""


@dataclass(frozen=True)
class _Answer:
    """What a server said: the text, why it ended, and where it tells them the tokens and their log-probabilities."""

    text: str
    finish: str
    token_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] = ()


class ServerGenerator(Generator):
    """Has prompts continued by a server that speaks the OpenAI protocol, such as `vllm serve`.

    Args:
        url: Where the protocol begins, such as `http://127.0.0.1:8000/v1`.
        model: The model's name on the server; a server of another model is refused.
        api: What is exchanged. `chat`: messages and text, which becomes the run's own tokens, for any model.
            `completions`: the prompts' token ids, and token ids where the server tells them, for a model with the run's
            tokenizer.
        key_variable: Name of the environment variable with the server's key; None sends none. The key itself is no
            setting.
        concurrency: Most requests at once, at least 1.
        timeout: Seconds within which an answer must be complete, above 0.
        retries: How often a request is tried again that failed in a way that may pass, at least 0.
        backoff: Seconds before the second try, at least 0; doubled for each further one, half of it by chance.
        max_wait: Longest wait before a try, in seconds. A server that asks for more is given up.
        length_key: What the protocol calls the longest response: newer models of OpenAI know the second name alone.
        extra: Further keys of each request, for what the protocol doesn't have.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If a number is out of range, `extra` has a key of the sampling, the URL holds a secret or is none,
            or `key_variable` is no name.
    """

    models = ()

    def __init__(
        self,
        url: str,
        model: str,
        api: Literal["chat", "completions"] = "chat",
        key_variable: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 1.0,
        max_wait: float = 300.0,
        length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        check_url(url, "ServerGenerator.url")
        check_variable(key_variable, "ServerGenerator.key_variable")
        if api not in ("chat", "completions"):
            raise ConfigError(f"ServerGenerator.api must be chat or completions, got {api!r}.")
        for name, number, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if number < least:
                raise ConfigError(f"ServerGenerator.{name} must be at least {least}, got {number}.")
        for name, number in (("timeout", timeout), ("max_wait", max_wait)):
            if not number > 0:
                raise ConfigError(f"ServerGenerator.{name} must be above 0 s, got {number}.")
        taken = sorted(_OURS.intersection(extra or {}))
        if taken:
            raise ConfigError(f"ServerGenerator.extra can't set {', '.join(taken)}: the model and the sampling do.")
        self.url, self.model, self.api, self.key_variable = url, model, api, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.backoff, self.max_wait, self.length_key = backoff, max_wait, length_key
        self.extra, self.progress = dict(extra or {}), progress
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()
        self._is_vllm: bool | None = None  # known once the server has been asked what it serves

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the run's tokenizer."""
        self._tokenizer, self._eos = tokenizer, eos_ids(tokenizer, None)

    def identity(self) -> str:
        """The model's name, what is exchanged and `extra`; not the URL, since a server may move."""
        name = f"server:{self.model}:{self.api}"
        if not self.extra:
            return name
        return f"{name}:{hashlib.sha256(json.dumps(self.extra, sort_keys=True).encode()).hexdigest()[:16]}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order.

        Raises:
            GenerationError: If the server had to be given up; it carries the responses that were finished.
            ModelError: If its tokens are not those of the run's tokenizer.
        """
        found: dict[int, tuple[Response, _Answer]] = {}
        client = self._client()
        try:
            with client, ThreadPoolExecutor(self.concurrency) as pool:
                self._check_model(client)
                self._ask_all(client, pool, prompts, sampling, found)
        except DistillKitError as failure:
            raise GenerationError(
                f"{str(failure).rstrip('.')}. The {len(found)} of {len(prompts)} answers that had come are kept: put "
                "that right and go on as after a killed run.",
                [found[place][0] for place in sorted(found)],
            ) from failure
        pairs = [found[place] for place in range(len(prompts))]
        self._check_tokens(pairs)
        _say_empty([answer for _, answer in pairs])
        return [response for response, _ in pairs]

    def _client(self) -> Client:
        return Client(
            self.url, self.key_variable, self.timeout, self.retries, self.backoff, self.max_wait, self.concurrency
        )

    def _ask_all(
        self,
        client: Client,
        pool: ThreadPoolExecutor,
        prompts: Prompts,
        sampling: Sampling,
        found: dict[int, tuple[Response, _Answer]],
    ) -> None:
        """Fills `found`, by the prompts' places; after a failure with what was under way, and nothing more is asked.

        Raises:
            DistillKitError: The first failure.
        """
        seeds = [sampling.seed_of(prompts.round, prompt.id) for prompt in prompts]
        places = {
            pool.submit(self._ask, client, prompt, sampling, seed): place
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        first: DistillKitError | None = None
        try:
            with token_bar("generate", len(prompts), self.progress) as advance:
                for future in as_completed(places):
                    place = places[future]
                    try:
                        answer = future.result()
                        # In this thread alone: two can't share a fast tokenizer.
                        found[place] = self._response(prompts[place], answer, sampling), answer
                        advance(1, len(found[place][0].token_ids))
                    except StoppedError:
                        continue
                    except DistillKitError as error:
                        first = first or error
                        client.stop()
        except BaseException:  # an interrupt must not wait for all that has not been asked yet
            client.stop()
            raise
        if first is not None:
            raise first

    def _ask(self, client: Client, prompt: Prompt, sampling: Sampling, seed: int) -> _Answer:
        body = {
            "model": self.model, "temperature": sampling.temperature, "top_p": sampling.top_p,
            self.length_key: sampling.max_new_tokens, "seed": seed >> 32,  # 31 bits: not every server takes more
        }  # fmt: skip
        if self.api == "chat":
            path, body["messages"] = "/chat/completions", [dict(message) for message in prompt.messages]
        else:
            path, body["prompt"] = "/completions", list(prompt.input_ids)
        if sampling.top_k or self._is_vllm:
            body["top_k"] = sampling.top_k
        if self._is_vllm:
            body |= _VLLM | ({} if self.api == "chat" else {"return_token_ids": True, "logprobs": 0})
        try:
            return client.ask(path, body | self.extra, self._read)
        except DistillKitError:
            client.stop()  # before this thread takes the next prompt
            raise

    def _read(self, answer: dict[str, Any]) -> _Answer:
        """What an answer says.

        Raises:
            PassingError: If it lacks what the protocol promises.
            ModelError: If another model wrote it.
        """
        named = answer.get("model")
        # A name such as gpt-4o stands for the newest of its dated models, and the answer names that one.
        if isinstance(named, str) and not re.fullmatch(rf"{re.escape(self.model)}(-[\d-]+)?", named):
            raise ModelError(
                f"{self.url} answers with the model {named}, and ServerGenerator.model is {self.model}: name the model "
                "that is to write, or the server that has it"
            )
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if self.api == "chat" else choice["text"]
            finish, token_ids = choice["finish_reason"], choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise PassingError("an answer without a choice, its text and why it ended") from error
        if not isinstance(text, str | None) or finish not in _FINISHES:
            raise PassingError(f"an answer that ended for {finish!r} with {type(text).__name__} as its text")
        if self.api == "chat" or token_ids is None:
            return _Answer(text or "", finish)
        if not all(isinstance(number, int) for number in token_ids):
            raise PassingError("an answer whose token ids are no numbers")
        given = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        return _Answer(text or "", finish, tuple(token_ids), tuple(given) if len(given) == len(token_ids) else ())

    def _response(self, prompt: Prompt, answer: _Answer, sampling: Sampling) -> Response:
        """The answer in the run's tokens.

        Raises:
            ModelError: If the server's tokens are others.
        """
        limit, ended = sampling.max_new_tokens, answer.finish == "stop"
        if answer.finish == "content_filter":
            return Response(prompt.id, (), "", "length")
        if answer.token_ids is None:
            return as_response(prompt, answer.text, ended, self._tokenizer, self._eos, limit)
        if max(answer.token_ids, default=0) >= len(self._tokenizer):
            raise ModelError(self._other_tokenizer())
        ids = answer.token_ids[:limit]
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        finish: Literal["stop", "length"] = "stop" if ended and len(ids) == len(answer.token_ids) else "length"
        return Response(prompt.id, ids, text, finish, answer.log_probs[:limit])

    def _check_model(self, client: Client) -> None:
        """Asks once what the server serves.

        Raises:
            ModelError: If that is another model.
        """
        if self._is_vllm is not None:
            return
        try:
            served = client.ask("/models", None, _served)
        except MissingError:
            _log.info("%s doesn't list its models: only its answers tell which one writes", self.url)
            served = {self.model: ""}
        if self.model not in served:
            raise ModelError(
                f"{self.url} serves {', '.join(sorted(served)) or 'no model'}, and ServerGenerator.model is "
                f"{self.model}: name a model that it serves, or the server that has this one"
            )
        self._is_vllm = served[self.model] == "vllm"

    def _check_tokens(self, pairs: Sequence[tuple[Response, _Answer]]) -> None:
        """Compares the server's texts with what its tokens say here: if none agrees, they are another tokenizer's."""
        told = [(r.text, a.text) for r, a in pairs if a.token_ids is not None and _letters(a.text)]
        if told and all(_letters(ours) != _letters(theirs) for ours, theirs in told):
            raise ModelError(f"{self._other_tokenizer()}.")

    def _other_tokenizer(self) -> str:
        return (
            f"{self.url} tells tokens that are not those of the run's tokenizer: {self.model} has another one, for "
            "which ServerGenerator.api must be chat"
        )


def _served(answer: dict[str, Any]) -> dict[str, str]:
    """Who owns each model that a server lists."""
    try:
        return {str(entry["id"]): str(entry.get("owned_by", "")) for entry in answer["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise PassingError("a list of models that is none") from error


def _letters(text: str) -> str:
    """What two decoders must agree on: no white space, and no half of a character."""
    return "".join(text.replace("\ufffd", "").split())


def _say_empty(answers: Sequence[_Answer]) -> None:
    empty = Counter(answer.finish for answer in answers if not answer.text.strip() or answer.finish == "content_filter")
    if empty:
        reasons = ", ".join(f"{count} ended for {finish}" for finish, count in sorted(empty.items()))
        _log.warning("%d of %d answers of the server are empty: %s", empty.total(), len(answers), reasons)

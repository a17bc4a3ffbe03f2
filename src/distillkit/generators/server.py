"""Generation by a server that speaks the OpenAI protocol."""

import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distillkit.data.turns import api_request
from distillkit.devices.stopping import StopRequested
from distillkit.errors import ConfigError, DistillKitError, GenerationError, ModelError
from distillkit.generators.progress import token_bar
from distillkit.generators.texts import as_response, decoded
from distillkit.interfaces import Generator
from distillkit.models.tokenizers import eos_ids, vocab_size
from distillkit.remote.http import Client, MissingError, StoppedError, TransientError, check_url, check_variable
from distillkit.types import Prompt, Prompts, Response, Sampling, Tokenizer

_log = logging.getLogger(__name__)

_RESERVED_KEYS = {"model", "messages", "prompt", "temperature", "top_p", "top_k", "max_tokens"}
_RESERVED_KEYS |= {"max_completion_tokens", "seed", "n", "stream"}
_FINISH_REASONS = ("stop", "length", "content_filter")
_VLLM_DEFAULTS = {"repetition_penalty": 1.0, "min_p": 0.0}
"""Besides top-k, the settings that vLLM takes from the model's generation config if a request does not set them."""


@dataclass(frozen=True)
class _Completion:
    """A server's completion: the text, why it ended, and whatever else the server sends of it."""

    text: str
    finish: str
    token_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True)
class _Result:
    """A completion, and the response in the run's tokens that it was converted to."""

    response: Response
    completion: _Completion


class ServerGenerator(Generator):
    """Generates with a server that speaks the OpenAI protocol, such as `vllm serve`.

    Args:
        url: Base URL of the API, such as `http://127.0.0.1:8000/v1`.
        model: The model's name on the server; a server of another model is refused.
        api: What is exchanged. `chat`: messages and text, which is converted to the run's tokens, for any model.
            `completions`: the prompts' token ids, and token ids in return if the server sends them, for a model with
            the run's tokenizer.
        key_variable: Name of the environment variable that holds the API key; None sends no key. The key itself is not
            a setting.
        concurrency: Maximum number of simultaneous requests, at least 1.
        timeout: Seconds within which a response must be complete, above 0.
        retries: How often a request is repeated after a failure that may pass, at least 0.
        backoff: Seconds before the first retry, at least 0; doubled for each further one, half of it random.
        max_wait: Longest wait before a retry, in seconds. If the server asks for a longer wait, the request fails.
        length_key: Name of the request key for the longest response: newer models of OpenAI accept only
            `max_completion_tokens`.
        extra: Further keys of each request, for options outside the protocol.
        progress: Whether a progress bar is shown.

    Raises:
        ConfigError: If a number is out of range, `extra` sets a key of the sampling, the URL is malformed or holds a
            secret, or `key_variable` is not the name of a variable.
    """

    needs_models = ()

    _tokenizer: Tokenizer

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
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < least:
                raise ConfigError(f"ServerGenerator.{name} must be at least {least}, got {value}.")
        for name, value in (("timeout", timeout), ("max_wait", max_wait)):
            if not value > 0:
                raise ConfigError(f"ServerGenerator.{name} must be above 0 s, got {value}.")
        reserved = sorted(_RESERVED_KEYS.intersection(extra or {}))
        if reserved:
            raise ConfigError(
                f"ServerGenerator.extra can't set {', '.join(reserved)}: the model and the sampling set these keys. "
                "Remove them."
            )
        self.url, self.model, self.api, self.key_variable = url, model, api, key_variable
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.backoff, self.max_wait, self.length_key = backoff, max_wait, length_key
        self.extra, self.progress = dict(extra or {}), progress
        self._eos: tuple[int, ...] = ()
        self._vocab = 0
        self._is_vllm: bool | None = None  # None until the server has listed its models

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Stores the run's tokenizer; the model is not used."""
        self._tokenizer, self._eos, self._vocab = tokenizer, eos_ids(tokenizer, None), vocab_size(tokenizer)

    def identity(self) -> str:
        """The model's name, the API and `extra`. The URL is not part of it, since a server may move."""
        name = f"server:{self.model}:{self.api}"
        if not self.extra:
            return name
        return f"{name}:{hashlib.sha256(json.dumps(self.extra, sort_keys=True).encode()).hexdigest()[:16]}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in their order.

        Raises:
            GenerationError: If a request failed for good; the error carries the responses that were received.
            ModelError: If the server's tokens are not those of the run's tokenizer.
        """
        results: dict[int, _Result] = {}
        client = self._client()
        try:
            with client, ThreadPoolExecutor(self.concurrency) as pool:
                self._check_model(client)
                self._request_all(client, pool, prompts, sampling, results)
        except StopRequested as stop:
            stop.finished = tuple(results[index].response for index in sorted(results))
            raise
        except DistillKitError as failure:
            raise GenerationError(
                f"{str(failure).rstrip('.')}. {len(results)} of {len(prompts)} responses were received and saved. Fix "
                f"this and run the same command again; only the other {len(prompts) - len(results)} are requested.",
                [results[index].response for index in sorted(results)],
            ) from failure
        ordered = [results[index] for index in range(len(prompts))]
        self._check_tokens(ordered)
        _warn_about_empty([result.completion for result in ordered])
        return [result.response for result in ordered]

    def _client(self) -> Client:
        return Client(
            self.url, self.key_variable, self.timeout, self.retries, self.backoff, self.max_wait, self.concurrency
        )

    def _request_all(
        self,
        client: Client,
        pool: ThreadPoolExecutor,
        prompts: Prompts,
        sampling: Sampling,
        results: dict[int, _Result],
    ) -> None:
        """Fills `results` by prompt index. After a failure, requests under way are completed and no new ones are sent.

        Raises:
            DistillKitError: The first failure.
        """
        seeds = [sampling.seed_of(prompts.round, prompt.id) for prompt in prompts]
        indices = {
            pool.submit(self._request, client, prompt, sampling, seed): index
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        first_error: DistillKitError | None = None
        try:
            with token_bar("generate", len(prompts), self.progress) as advance:
                for future in as_completed(indices):
                    index = indices[future]
                    try:
                        completion = future.result()
                        # Converted in this thread only: two threads can't share a fast tokenizer.
                        response = self._response(prompts[index], completion, sampling)
                        results[index] = _Result(response, completion)
                        advance(1, len(response.token_ids))
                    except StoppedError:
                        continue
                    except DistillKitError as error:
                        first_error = first_error or error
                        client.stop()
        except BaseException as error:
            # An interrupt must not wait for requests, neither for those that are under way.
            (client.stop if isinstance(error, Exception) else client.abort)()
            for future, index in indices.items():  # received, and not looked at yet
                if index not in results and future.done() and not future.cancelled() and future.exception() is None:
                    with suppress(DistillKitError):
                        completion = future.result()
                        results[index] = _Result(self._response(prompts[index], completion, sampling), completion)
            raise
        if first_error is not None:
            raise first_error

    def _request(self, client: Client, prompt: Prompt, sampling: Sampling, seed: int) -> _Completion:
        body: dict[str, object] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.length_key: sampling.max_new_tokens,
            "seed": seed >> 32,  # 31 bits: not every server takes more
        }
        if self.api == "chat":
            path, body = "/chat/completions", body | api_request(prompt.messages)
        else:
            path, body["prompt"] = "/completions", list(prompt.input_ids)
        if sampling.top_k or self._is_vllm:
            body["top_k"] = sampling.top_k
        if self._is_vllm:
            body |= _VLLM_DEFAULTS | ({} if self.api == "chat" else self._token_settings())
        try:
            return client.request(path, body | self.extra, self._read)
        except DistillKitError:
            client.stop()  # before this thread takes the next prompt
            raise

    def _token_settings(self) -> dict[str, object]:
        """Request keys that have vLLM return token ids, and end a response at the run's end tokens."""
        return {"return_token_ids": True, "logprobs": 0, "stop_token_ids": list(self._eos)}

    def _read(self, answer: dict[str, Any]) -> _Completion:
        """Parses the JSON object of a server's response.

        Raises:
            TransientError: If the object lacks what the protocol requires.
            ModelError: If another model generated the text.
        """
        answering_model = answer.get("model")
        # A name such as gpt-4o stands for the newest of its dated models, and the response names that one.
        if isinstance(answering_model, str) and not re.fullmatch(
            rf"{re.escape(self.model)}(-[\d-]+)?", answering_model
        ):
            raise ModelError(
                f"{self.url} responded with the model {answering_model}, but ServerGenerator.model is {self.model}. "
                "Set ServerGenerator.model to the model that should generate, or ServerGenerator.url to a server that "
                "has it"
            )
        try:
            choice = answer["choices"][0]
            message = choice["message"] if self.api == "chat" else {"content": choice["text"]}
            text = message["content"]
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            finish, token_ids = choice["finish_reason"], choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise TransientError("a response without a choice, its text or its finish_reason") from error
        if not isinstance(text, str | None) or not isinstance(reasoning, str) or finish not in _FINISH_REASONS:
            raise TransientError(f"a response with finish_reason {finish!r} and a text of type {type(text).__name__}")
        if not _is_encodable(f"{text or ''}{reasoning}"):
            raise TransientError("a response whose text is not valid Unicode (a lone surrogate)")
        if self.api == "chat" or token_ids is None:
            return _Completion(text or "", finish, reasoning=reasoning)
        return _Completion(
            text or "", finish, _token_ids(token_ids), _log_probs(choice.get("logprobs"), len(token_ids))
        )

    def _response(self, prompt: Prompt, completion: _Completion, sampling: Sampling) -> Response:
        """Converts a completion to the run's tokens.

        Raises:
            ModelError: If the server sent token ids that the run's tokenizer does not have.
        """
        limit, ended = sampling.max_new_tokens, completion.finish == "stop"
        if completion.finish == "content_filter":
            return Response(prompt.id, (), "", "length")
        if completion.token_ids is None:
            return as_response(prompt, completion.text, ended, self._tokenizer, self._eos, limit, completion.reasoning)
        if max(completion.token_ids, default=0) >= self._vocab:
            raise ModelError(self._tokenizer_mismatch())
        ids = completion.token_ids[:limit]
        text = decoded(self._tokenizer, ids, self._eos, prompt)
        finish: Literal["stop", "length"] = "stop" if ended and len(ids) == len(completion.token_ids) else "length"
        return Response(prompt.id, ids, text, finish, completion.log_probs[:limit])

    def _check_model(self, client: Client) -> None:
        """Asks the server once for its list of models.

        Raises:
            ModelError: If the list lacks `model`.
        """
        if self._is_vllm is not None:
            return
        try:
            owners = client.request("/models", None, _owners)
        except MissingError:
            _log.info("%s does not list its models; the model is checked in each response instead", self.url)
            owners = {self.model: ""}
        if self.model not in owners:
            raise ModelError(
                f"{self.url} serves {', '.join(sorted(owners)) or 'no model'}, but ServerGenerator.model is "
                f"{self.model}. Set ServerGenerator.model to a model that the server has, or ServerGenerator.url to a "
                "server that has this model"
            )
        self._is_vllm = owners[self.model] == "vllm"

    def _check_tokens(self, results: Sequence[_Result]) -> None:
        """Compares the server's texts with its token ids decoded here: if no pair agrees, the tokenizers differ."""
        texts = [
            (result.response.text, result.completion.text)
            for result in results
            if result.completion.token_ids is not None and _comparable(result.completion.text)
        ]
        if texts and all(_comparable(decoded) != _comparable(received) for decoded, received in texts):
            raise ModelError(f"{self._tokenizer_mismatch()}.")

    def _tokenizer_mismatch(self) -> str:
        return (
            f"{self.url} sends token ids that are not those of the run's tokenizer: {self.model} has another "
            "tokenizer. Set ServerGenerator.api to chat"
        )


def _owners(answer: dict[str, Any]) -> dict[str, str]:
    """Maps each model that a server lists to its owner."""
    try:
        return {str(entry["id"]): str(entry.get("owned_by", "")) for entry in answer["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise TransientError("a malformed list of models") from error


def _token_ids(values: object) -> tuple[int, ...]:
    """The token ids of a response.

    Raises:
        TransientError: If they are not a list of numbers from 0.
    """
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise TransientError("a response with token ids that are not a list of integers from 0")
    return tuple(values)


def _log_probs(content: object, length: int) -> tuple[float, ...]:
    """The log-probabilities of a response's tokens; empty if the server does not send one for each.

    Raises:
        TransientError: If one is not a log-probability.
    """
    values = content.get("token_logprobs") if isinstance(content, dict) else content
    if values is None or values == []:
        return ()
    if not isinstance(values, list):
        raise TransientError("a response whose log-probabilities are not a list")
    if not all(type(value) in (int, float) and -sys.float_info.max <= value <= 0 for value in values):
        raise TransientError("a response with a log-probability that is not a finite number of at most 0")
    return tuple(map(float, values)) if len(values) == length else ()


def _is_encodable(text: str) -> bool:
    """Whether a text is valid Unicode: JSON can smuggle in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _comparable(text: str) -> str:
    """The part of a text that two decoders must agree on: no white space and no incomplete characters."""
    return "".join(text.replace("\ufffd", "").split())


def _warn_about_empty(completions: Sequence[_Completion]) -> None:
    empty = Counter(
        completion.finish
        for completion in completions
        if not (completion.text.strip() or completion.reasoning) or completion.finish == "content_filter"
    )
    if empty:
        reasons = ", ".join(f"{count} with finish_reason {finish}" for finish, count in sorted(empty.items()))
        _log.warning("%d of %d responses of the server are empty: %s", empty.total(), len(completions), reasons)

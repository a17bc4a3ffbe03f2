"""Responses read from a file."""

import hashlib
import logging
from functools import cached_property

from torch import nn

from distillkit.data.chat import prompt_id
from distillkit.data.locations import kind_of
from distillkit.data.records import OnError, Source
from distillkit.errors import ConfigError, DataError
from distillkit.generators.texts import as_response
from distillkit.interfaces import Generator
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Message, Prompt, Prompts, Response, Sampling, Tokenizer

_log = logging.getLogger(__name__)


class FileGenerator(Generator):
    """Reads responses from a file. Responses longer than the sampling's `max_new_tokens` are cut.

    A response is looked up by the prompt's messages. If the run puts a system message before the prompt, it is also
    looked up without that message. Of several responses to a prompt, each round reads the next one, beginning with
    number `seed` of the sampling: so the samples of `BestOfN` differ.

    Args:
        path: A .jsonl, .json, .csv, .tsv or .parquet file, a pattern for several,
            `wheel:NAME==VERSION/PATH#sha256=HEX`, or a list of these.
        prompt_column: Column with the user's prompt as text.
        response_column: Column with the response as text.
        messages_column: Column with a whole conversation, whose last turn is the response.
        ignored_keys: Columns, and keys of messages, that have no effect. A row with any other is refused, except for
            metadata such as `id`.
        on_error: Treatment of rows that can't be used: `stop` lists them and stops, `skip` leaves them out, counts and
            lists them.

    Raises:
        ConfigError: If the path is a folder or a hub id.
        DataError: If a file is missing or has an unknown format.
    """

    needs_models = ()
    progress = False
    responses_per_shard = 1 << 20
    """All prompts at once: reading costs nothing, and missing responses are counted over all prompts."""

    _tokenizer: Tokenizer

    def __init__(
        self,
        path: str | list[str],
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        ignored_keys: list[str] | None = None,
        on_error: OnError = "stop",
    ) -> None:
        self.source = Source(
            path,
            prompt_column=prompt_column,
            response_column=response_column,
            messages_column=messages_column,
            ignored_keys=ignored_keys,
            on_error=on_error,
        )
        for item in self.source.paths:
            if kind_of(item) in ("hub", "folder"):
                raise ConfigError(
                    f"FileGenerator.path must be a file, got {item!r}. A dataset has no content hash: name its files, "
                    "after a download if it is on the hub."
                )
        self.source.check()
        self.path = path
        self._columns = (prompt_column, response_column, messages_column)
        self._eos: tuple[int, ...] = ()

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Stores the run's tokenizer; the model is not used."""
        self._tokenizer, self._eos = tokenizer, eos_ids(tokenizer, None)

    def identity(self) -> str:
        """The files' sha256, and the columns if they are not the default ones; the paths are not part of it."""
        hashes = []
        for file in self.source.files() or ():
            with file.open("rb") as stream:
                hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
        name = f"file:{hashes[0] if len(hashes) == 1 else hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"
        is_default = self._columns == ("prompt", "response", "messages")
        return name if is_default else f"{name}:{'/'.join(self._columns)}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Returns the file's responses, in the order of the prompts.

        Raises:
            DataError: If the file has no response to some of the prompts.
        """
        number = prompts.round + (sampling.seed or 0)
        answers = [self._answers_to(prompt) for prompt in prompts]
        missing = [prompt for prompt, choices in zip(prompts, answers, strict=True) if not choices]
        if missing:
            raise DataError(
                f"{self.path} has no response to {len(missing)} of {len(prompts)} prompts, the first is "
                f"{missing[0].excerpt}. Add the responses, or remove these prompts from the "
                "data."
            )
        responses = []
        for prompt, choices in zip(prompts, answers, strict=True):
            answer, ended = choices[number % len(choices)]
            text, reasoning = answer["content"], answer.get("reasoning_content", "")
            limit = sampling.max_new_tokens
            responses.append(as_response(prompt, text, ended, self._tokenizer, self._eos, limit, reasoning))
        return responses

    def _answers_to(self, prompt: Prompt) -> list[tuple[Message, bool]]:
        answers = self._answers.get(prompt_id(prompt.messages), [])
        if not answers and prompt.messages[0]["role"] == "system" and len(prompt.messages) > 1:
            answers = self._answers.get(prompt_id(prompt.messages[1:]), [])
        return answers

    @cached_property
    def _answers(self) -> dict[str, list[tuple[Message, bool]]]:
        """Maps prompt ids to the different responses, in the file's order, and whether each is complete."""
        answers: dict[str, list[tuple[Message, bool]]] = {}
        for record in self.source.records():
            if record.messages[-1]["role"] != "assistant":
                continue  # a prompt without a response: reported by `generate`, if that prompt is requested
            if "tool_calls" in record.messages[-1]:
                raise DataError(f"{record.origin} has a response with tool calls, which DatasetCurator alone can use.")
            choices = answers.setdefault(prompt_id(record.messages[:-1]), [])
            if (record.messages[-1], record.ended) not in choices:
                choices.append((record.messages[-1], record.ended))
        several = sum(len(choices) > 1 for choices in answers.values())
        if several:
            _log.info("%s has several responses to %d of %d prompts", self.path, several, len(answers))
        return answers

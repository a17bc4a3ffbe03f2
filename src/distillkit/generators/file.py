"""A generator that is a file of responses."""

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from distillkit.data.chat import prompt_id
from distillkit.data.records import Source
from distillkit.errors import ConfigError, DataError
from distillkit.fetch import is_wheel, wheel_file
from distillkit.generators.texts import as_response
from distillkit.interfaces import Generator
from distillkit.models.tokenizers import eos_ids
from distillkit.types import Prompt, Prompts, Response, Sampling

_log = logging.getLogger(__name__)


class FileGenerator(Generator):
    """Takes responses from a file, by their prompts. Of the sampling only `max_new_tokens` is read, and cuts them.

    A prompt is found by its messages; where the run puts a system message before it, without that too.

    Args:
        path: A .jsonl, .jsonl.gz, .csv or .parquet file, or `wheel:NAME==VERSION/PATH#sha256=HEX`.
        prompt_column: Column with the user's prompt, a text.
        response_column: Column with the response to the prompt, a text.
        messages_column: Column with a whole conversation, whose last turn is the response.

    Raises:
        ConfigError: If the path is a hub id.
        DataError: If the file is missing or of an unknown format.
    """

    models = ()
    progress = False
    responses_per_shard = 1 << 20
    """All prompts at once: nothing is lost with a killed run, and what is missing is counted over all of them."""

    def __init__(
        self,
        path: str,
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
    ) -> None:
        self.source = Source(path, "train", prompt_column, response_column, messages_column)
        if self.source.on_hub:
            raise ConfigError(f"FileGenerator.path must be a file, got {path!r}: a dataset on the hub has no hash.")
        self.source.check()
        self.path = path
        self._columns = (prompt_column, response_column, messages_column)
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Takes the run's tokenizer."""
        self._tokenizer, self._eos = tokenizer, eos_ids(tokenizer, None)

    def identity(self) -> str:
        """The file's sha256, and its columns if they are not the usual ones; not its path."""
        file = wheel_file(self.path) if is_wheel(self.path) else Path(self.path).expanduser()
        with file.open("rb") as stream:
            name = f"file:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        usual = self._columns == ("prompt", "response", "messages")
        return name if usual else f"{name}:{'/'.join(self._columns)}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """The file's responses to the prompts, in their order.

        Raises:
            DataError: If it lacks some.
        """
        texts = [self._text_for(prompt) for prompt in prompts]
        missing = [prompt for prompt, text in zip(prompts, texts, strict=True) if text is None]
        if missing:
            raise DataError(
                f"{self.path} has no response to {len(missing)} of {len(prompts)} prompts, the first is "
                f"{missing[0].messages[-1]['content'][:60]!r}: add them, or take these prompts out of the data."
            )
        return [
            as_response(prompt, text or "", True, self._tokenizer, self._eos, sampling.max_new_tokens)
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _text_for(self, prompt: Prompt) -> str | None:
        found = self._texts.get(prompt.id)
        if found is None and prompt.messages[0]["role"] == "system" and len(prompt.messages) > 1:
            found = self._texts.get(prompt_id(prompt.messages[1:]))
        return found

    @cached_property
    def _texts(self) -> dict[str, str]:
        """The responses by the ids of their prompts."""
        found: dict[str, str] = {}
        again = 0
        for record in self.source.records():
            if record.messages[-1]["role"] != "assistant":
                continue  # a prompt alone: it is missed, and counted, where it is asked for
            name = prompt_id(record.messages[:-1])
            again += name in found
            found.setdefault(name, record.messages[-1]["content"])
        if again:
            _log.info("%s: %d responses to prompts that an earlier row answers are left out", self.path, again)
        return found

"""Prompts that a model writes by itself."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from distillkit.data.chat import require_chat_template
from distillkit.data.ngrams import repetition, words
from distillkit.data.records import Record, Source
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.fetch import cache_dir
from distillkit.generators.in_process import TransformersGenerator
from distillkit.manifest import write_atomically
from distillkit.models.loading import load_model
from distillkit.models.sources import check, identity
from distillkit.models.tokenizers import load_tokenizer
from distillkit.types import Prompt, Prompts, Response, Sampling

_log = logging.getLogger(__name__)

VERSION = 1
"""Of the way in which prompts are written and filtered: another one finds no file of this one."""

SENTINEL = "QZXJWVKQ"
TRIES = 8
"""Texts written for each prompt that is wanted, at most."""


class MagpiePrompts(Source):
    """Prompts that a chat model writes by itself: it continues its template where a user's turn has just been opened.

    Xu et al. 2024 (Magpie), arXiv 2406.08464. The template's own system message, if it has one, stands before the turn.
    Left out are texts that were cut, that are empty, no text, too short, or repeated, and those that came before; the
    log says how many. What is kept is written once, to a file in the cache: a resumed run reads the same prompts.

    Args:
        source: The model: a hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        num_prompts: Prompts that are wanted, at least 1.
        sampling: How they are drawn; None is temperature 1, top-p 0.99, at most 128 tokens. Its seed is theirs.
        system: System message before the user's turn; None leaves it to the template.
        min_words: Fewest words of a prompt, at least 1.
        dtype: Type of the model's parameters.
        batch_size: Prompts written at once.

    Raises:
        ConfigError: If a number is below 1.
    """

    def __init__(
        self,
        source: str,
        num_prompts: int = 200,
        sampling: Sampling | None = None,
        system: str | None = None,
        min_words: int = 3,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 32,
    ) -> None:  # none of Source's own settings is one of these
        for name, number in {"num_prompts": num_prompts, "min_words": min_words, "batch_size": batch_size}.items():
            if number < 1:
                raise ConfigError(f"MagpiePrompts.{name} must be at least 1, got {number}.")
        self.path, self.num_prompts, self.system, self.min_words = source, num_prompts, system, min_words
        self.sampling = sampling or Sampling(temperature=1.0, top_p=0.99, max_new_tokens=128)
        self.dtype: Literal["float32", "bfloat16", "float16"] = dtype
        self.batch_size = batch_size

    def check(self) -> None:
        """Finds out without loading anything whether the model can be one.

        Raises:
            ModelError: If it is missing, or its name has another form.
        """
        check(self.path)

    def records(self) -> list[Record]:
        """The prompts, written by the model unless they are in the cache.

        Raises:
            DataError: If too few of the texts that the model writes are prompts.
            ModelError: If the model can't be loaded or its chat template has no place for a user's turn.
        """
        file = self.file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                rows = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in self._write()]
                write_atomically(file, "".join(rows).encode())
        _log.info("MagpiePrompts: %d prompts in %s", self.num_prompts, file)
        return Source(str(file)).records()

    def file(self) -> Path:
        """Where the prompts are kept: its name depends on the model's weights and on every setting but the batch size.

        Raises:
            ModelError: If the model is a folder without weights.
        """
        weights = identity(self.path)
        if weights is None:
            raise ModelError(f"{self.path} has no weights: name a folder with safetensors.")
        settings = {
            "version": VERSION, "model": weights, "num_prompts": self.num_prompts, "sampling": asdict(self.sampling),
            "system": self.system, "min_words": self.min_words, "dtype": self.dtype,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "prompts" / f"magpie-{digest}.jsonl"

    def _write(self) -> list[str]:
        tokenizer = load_tokenizer(self.path)
        require_chat_template(tokenizer, chat=True)
        before, after = open_turn(tokenizer, self.system)
        ids = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = TransformersGenerator(self.batch_size)
        generator.refresh(load_model(self.path, self.dtype).to(device), tokenizer)
        judge = _Judge(tokenizer, after.strip(), self.min_words)
        for response in self._responses(generator, ids):
            judge.take(response)
            if len(judge.kept) == self.num_prompts:
                break
        told = ", ".join(f"{count} {reason}" for reason, count in judge.left_out.items()) or "none left out"
        if len(judge.kept) < self.num_prompts:
            raise DataError(
                f"MagpiePrompts: of {judge.count} texts that {self.path} wrote only {len(judge.kept)} are prompts "
                f"({told}), and {self.num_prompts} are wanted: take a model that was tuned on chats, or want fewer."
            )
        _log.info("MagpiePrompts: %d of %d texts by %s kept; %s", len(judge.kept), judge.count, self.path, told)
        return list(judge.kept)

    def _responses(self, generator: TransformersGenerator, ids: tuple[int, ...]) -> Iterator[Response]:
        """What the model writes, text by text; each depends on the seed and its number alone."""
        for start in range(0, TRIES * self.num_prompts, self.batch_size):
            numbers = range(start, min(start + self.batch_size, TRIES * self.num_prompts))
            texts = Prompts(tuple(Prompt(f"magpie-{number}", (), ids) for number in numbers))
            yield from generator.generate(texts, self.sampling)


def open_turn(tokenizer: Any, system: str | None = None) -> tuple[str, str]:
    """What a chat template writes before a user's first turn, and what it writes behind it.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        system: System message before the turn; None leaves it to the template.

    Raises:
        ModelError: If the template does not write a user's turn as it is, or writes nothing before it.
    """
    messages = [{"role": "user", "content": SENTINEL}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    before, found, after = text.partition(SENTINEL)
    if not found or SENTINEL in after or not before.strip():
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} marks no place where a user's turn begins, so that it can "
            "write no prompts: take a model with another template."
        )
    return before, after


class _Judge:
    """Keeps the texts that are prompts, and counts why the others are not.

    Args:
        tokenizer: The model's tokenizer.
        end: What the template writes behind a user's turn: where it isn't a token that ends the model's own turns, the
            model writes it and goes on.
        min_words: Fewest words of a prompt.
    """

    def __init__(self, tokenizer: Any, end: str, min_words: int) -> None:
        self.tokenizer, self.end, self.min_words = tokenizer, end, min_words
        self.special = sorted(tokenizer.all_special_tokens)
        self.kept: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.count = 0
        self._seen: set[tuple[str, ...]] = set()

    def take(self, response: Response) -> None:
        """Looks at one text."""
        self.count += 1
        text, ended = self._turn(response)
        reason = self._reason(text, ended)
        if reason is None:
            self.kept.append(text)
            self._seen.add(words(text))
        else:
            self.left_out[reason] += 1

    def _turn(self, response: Response) -> tuple[str, bool]:
        """The user's turn, and whether it was ended."""
        ids = list(response.token_ids)
        if response.finish == "stop":
            ids.pop()
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        turn, found, _ = text.partition(self.end) if self.end else (text, "", "")
        return turn.strip(), bool(found) or response.finish == "stop"

    def _reason(self, text: str, ended: bool) -> str | None:
        """Why a text is no prompt; None if it is one."""
        found = words(text)
        if not ended:
            return "cut"
        if not text:
            return "empty"
        if any(special in text for special in self.special) or not _is_text(text):
            return "no text"
        if len(found) < self.min_words:
            return "too short"
        if repetition(found, 3, 64) > 0.5:
            return "repeated"
        return "written before" if found in self._seen else None


def _is_text(text: str) -> bool:
    """Whether a text has letters, and nothing that is neither printed nor white space."""
    return any(map(str.isalpha, text)) and all((c.isprintable() and c != "\ufffd") or c in "\n\t" for c in text)

"""Prompts that a chat model generates without input (Magpie)."""

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from distillkit.data.chat import require_chat_template
from distillkit.data.ngrams import repetition
from distillkit.data.records import Source
from distillkit.data.word_tokens import words
from distillkit.errors import DataError, ModelError, check_range
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import PromptSource
from distillkit.models.loading import load_model
from distillkit.models.options import SourceOptions
from distillkit.models.sources import check, identity
from distillkit.models.tokenizers import load_tokenizer
from distillkit.remote.wheels import cache_dir
from distillkit.storage.atomic import write_atomically
from distillkit.types import Prompt, Prompts, Record, Response, Sampling, Tokenizer

_log = logging.getLogger(__name__)

VERSION = 2
"""Version of the generation and filtering; part of the cache file's name, so that a change makes a new file."""

SENTINEL = "QZXJWVKQ"
_NO_TEXT = ("Cc", "Cs", "Co", "Cn")
"""Unicode categories of controls, surrogates, private and unassigned characters."""

MAX_ATTEMPTS = 8
"""Maximum number of texts generated per requested prompt."""


class MagpiePrompts(PromptSource):
    """Prompts that a chat model generates: it continues its chat template at the start of a user's turn.

    Xu et al. 2024 (Magpie), arXiv 2406.08464. The template's system message, if it has one, comes before the turn.
    Texts that are truncated, empty, not text, too short, repetitive or duplicates are rejected; the log counts them.
    The prompts are stored once, in a cache file: a resumed run reads the same prompts.

    Args:
        source: The model: a hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        num_prompts: Number of prompts to generate, at least 1.
        sampling: Sampling of the prompts, seed included; None is temperature 1, top-p 0.99, at most 128 tokens,
            and seed 0, so that runs with different seeds have the same prompts.
        system: System message before the user's turn; None leaves it to the template.
        min_words: Fewest words of a prompt, at least 1. In scripts written without spaces, such as Chinese and Thai,
            each character is a word.
        dtype: Type of the model's parameters.
        batch_size: Prompts per batch.
        revision: Branch, tag or commit of a hub id; None is its main branch.
        trust_remote_code: Whether Python code that comes with the model may run.

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
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        for name, value in {"num_prompts": num_prompts, "min_words": min_words, "batch_size": batch_size}.items():
            check_range(f"MagpiePrompts.{name}", value, 1)
        self.path, self.num_prompts, self.system, self.min_words = source, num_prompts, system, min_words
        self.sampling = sampling or Sampling(temperature=1.0, top_p=0.99, max_new_tokens=128, seed=0)
        self.dtype: Literal["float32", "bfloat16", "float16"] = dtype
        self.batch_size, self.options = batch_size, SourceOptions(revision, trust_remote_code)

    def check(self) -> None:
        """Checks the model's source without loading anything.

        Raises:
            ModelError: If the model is missing, or its source is malformed.
        """
        check(self.path, self.options)

    def records(self) -> list[Record]:
        """Returns the prompts from the cache, or generates them.

        Raises:
            DataError: If too few of the generated texts are usable prompts.
            ModelError: If the model can't be loaded, or its chat template does not mark a user's turn.
        """
        file = self.file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                rows = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in self._generate()]
                write_atomically(file, "".join(rows).encode())
        _log.info("MagpiePrompts: %d prompts in %s", self.num_prompts, file)
        return Source(str(file)).records()

    def file(self) -> Path:
        """Path of the cache file: its name depends on the model's weights and on every setting but the batch size.

        Raises:
            ModelError: If the model is a folder without weights.
        """
        weights = identity(self.path, self.options)
        if weights is None:
            raise ModelError(f"MagpiePrompts.source: {self.path} has no weights. Name a folder with safetensors.")
        settings = {
            "version": VERSION,
            "model": weights,
            "num_prompts": self.num_prompts,
            "sampling": asdict(self.sampling),
            "system": self.system,
            "min_words": self.min_words,
            "dtype": self.dtype,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "prompts" / f"magpie-{digest}.jsonl"

    def _generate(self) -> list[str]:
        tokenizer = load_tokenizer(self.path, self.options)
        require_chat_template(tokenizer, chat=True)
        before, after = user_turn_affixes(tokenizer, self.system)
        ids = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = TransformersGenerator(self.batch_size)
        generator.refresh(load_model(self.path, self.dtype, None, self.options).to(device), tokenizer)
        candidates = _PromptFilter(tokenizer, after.strip(), self.min_words)
        for response in self._responses(generator, ids):
            candidates.add(response)
            if len(candidates.prompts) == self.num_prompts:
                break
        reasons = ", ".join(f"{count} {reason}" for reason, count in candidates.rejected.items()) or "none rejected"
        if len(candidates.prompts) < self.num_prompts:
            raise DataError(
                f"MagpiePrompts: only {len(candidates.prompts)} of {candidates.count} texts from {self.path} are "
                f"usable prompts ({reasons}), but num_prompts is {self.num_prompts}. Use a chat-tuned model, or lower "
                "num_prompts."
            )
        _log.info(
            "MagpiePrompts: accepted %d of %d texts from %s (%s)",
            len(candidates.prompts),
            candidates.count,
            self.path,
            reasons,
        )
        return list(candidates.prompts)

    def _responses(self, generator: TransformersGenerator, ids: tuple[int, ...]) -> Iterator[Response]:
        """Yields generated texts; each depends only on the seed and its index."""
        for start in range(0, MAX_ATTEMPTS * self.num_prompts, self.batch_size):
            indices = range(start, min(start + self.batch_size, MAX_ATTEMPTS * self.num_prompts))
            batch = Prompts(tuple(Prompt(f"magpie-{index}", (), ids) for index in indices))
            yield from generator.generate(batch, self.sampling)


def user_turn_affixes(tokenizer: Tokenizer, system: str | None = None) -> tuple[str, str]:
    """The text that a chat template puts before a user's first turn, and the text that it puts after the turn.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        system: System message before the turn; None leaves it to the template.

    Raises:
        ModelError: If the template changes or repeats a user's text, or puts nothing before it.
    """
    messages = [{"role": "user", "content": SENTINEL}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    before, sentinel, after = text.partition(SENTINEL)
    if not sentinel or SENTINEL in after or not before.strip():
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} does not mark where a user's turn begins, so the model "
            "can't generate prompts. Use a model with another template."
        )
    return before, after


class _PromptFilter:
    """Collects the texts that are usable prompts, and counts why the rest are not.

    Args:
        tokenizer: The model's tokenizer.
        end: Text that the template puts after a user's turn. If it is not a token that ends the model's own turns, the
            model generates it and goes on.
        min_words: Fewest words of a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, end: str, min_words: int) -> None:
        self.tokenizer, self.end, self.min_words = tokenizer, end, min_words
        self.special = sorted(tokenizer.all_special_tokens)
        self.prompts: list[str] = []
        self.rejected: Counter[str] = Counter()
        self.count = 0
        self._accepted_words: set[tuple[str, ...]] = set()

    def add(self, response: Response) -> None:
        """Accepts or rejects one generated text."""
        self.count += 1
        text, ended = self._turn(response)
        reason = self._rejection(text, ended)
        if reason is None:
            self.prompts.append(text)
            self._accepted_words.add(words(text))
        else:
            self.rejected[reason] += 1

    def _turn(self, response: Response) -> tuple[str, bool]:
        """The text of the user's turn, and whether the turn ended."""
        ids = list(response.token_ids)
        if response.finish == "stop":
            ids.pop()
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        turn, end, _ = text.partition(self.end) if self.end else (text, "", "")
        return turn.strip(), bool(end) or response.finish == "stop"

    def _rejection(self, text: str, ended: bool) -> str | None:
        """The reason for which a text is rejected; None if it is a usable prompt."""
        text_words = words(text)
        if not ended:
            return "truncated"
        if not text:
            return "empty"
        if any(special in text for special in self.special) or not _is_text(text):
            return "not text"
        if len(text_words) < self.min_words:
            return "too short"
        if repetition(text_words, 3, 64) > 0.5:
            return "repetitive"
        return "duplicate" if text_words in self._accepted_words else None


def _is_text(text: str) -> bool:
    """Returns True if a text has letters, and no control characters, unassigned ones or parts of characters."""
    # Joiners and ideographic spaces, which str.isprintable refuses, belong to Persian, Hindi and Chinese texts.
    is_broken = any((unicodedata.category(c) in _NO_TEXT or c == "\ufffd") and c not in "\n\t" for c in text)
    return any(map(str.isalpha, text)) and not is_broken

"""Tiny models and a tiny tokenizer, made on the spot; nothing is downloaded."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distillkit.testing.tiny import CHAT_TEMPLATE as CHAT_TEMPLATE
from distillkit.testing.tiny import END as END
from distillkit.testing.tiny import END_ID as END_ID
from distillkit.testing.tiny import START as START
from distillkit.testing.tiny import START_ID as START_ID
from distillkit.testing.tiny import tiny_model, tiny_tokenizer


def save_tiny(folder: Path | str, layers: int = 2, hidden: int = 32, seed: int = 0, **config: object) -> Path:
    """Saves a tiny model with the tiny tokenizer as a transformers folder, and returns the folder."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), layers=layers, hidden=hidden, seed=seed, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


GAPPED_END_ID = 330
"""The end token of `gapped_tokenizer`, which has 320 tokens."""


def gapped_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with its end token behind a gap of ten ids."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"][END] = content["added_tokens"][END_ID]["id"] = GAPPED_END_ID
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=END)

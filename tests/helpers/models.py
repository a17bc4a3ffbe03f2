"""Tiny models and a tiny tokenizer, made on the spot; nothing is downloaded."""

from pathlib import Path

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

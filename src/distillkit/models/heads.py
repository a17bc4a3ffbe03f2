"""Output head of a transformers model, and the check that its logits are this head's.

Letters: T tokens, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distillkit.chunked.output_head import OutputHead
from distillkit.errors import ModelError
from distillkit.models.modes import evaluating
from distillkit.models.structure import base_model, last_states, text_body

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def logits_width(model: nn.Module) -> int:
    """Number of logits of the model, padding of the vocabulary included."""
    head = base_model(model).get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: only causal language models can be used.")
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(
            f"The output embedding of {type(model).__name__} is {type(head).__name__}, which has no weight [V, D]: "
            "it must be one linear layer, with or without an adapter."
        )
    return int(weight.shape[0])


def output_head(model: nn.Module, vocab: int) -> OutputHead:
    """The model's head, cut to `vocab` tokens."""
    base = base_model(model)
    text = base.config.get_text_config()
    caps = (getattr(text, name, None) for name in _SOFTCAPS)
    return OutputHead(base.get_output_embeddings(), vocab, _scale(text), next(filter(None, caps), None))


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the bound on logits in the configurations of Gemma 2 and 3, RecurrentGemma, and xLSTM."""


def _scale(config: "PreTrainedConfig") -> float:
    """Factor of the logits, such as that of Cohere, Falcon-H1, Granite, HyperCLOVAX and MiniCPM3; otherwise 1."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scale * (scaling if config.model_type.startswith("hyperclovax") else 1.0 / scaling)


@contextmanager
def attempted(name: str, what: str) -> Iterator[None]:
    """Turns whatever a model raises in a test pass into a `ModelError` of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the code of any architecture: it may raise anything
        raise ModelError(
            f"{name}: {what} fails with {summary(error)}. distillkit does not support this model."
        ) from error


def summary(error: Exception) -> str:
    """Class and message of an error, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> None:
    """Refuses an architecture whose logits are not the output head applied to its last hidden states.

    They are compared as they are, and with the products of the head made large, where a soft cap shows.

    Args:
        model: The model, on the device that it will run on.
        name: Name of the model in the error.

    Raises:
        ModelError: If the model's own logits differ from those of `output_head`, or are not finite.
    """
    base, head = base_model(model), output_head(model, logits_width(model))
    ids = torch.arange(4, device=base.device)[None]  # [1, 4], arbitrary tokens
    with evaluating(model), attempted(name, "a test pass over 4 tokens"):
        hidden = last_states(text_body(model), input_ids=ids, use_cache=False)[0]
        products = head.module(head.narrowed(hidden))
        factor = LARGE_LOGIT / max(float(products.abs().max()), 1e-6)
        pairs = [
            (base(input_ids=ids, use_cache=False).logits[0].float(), head(hidden).float()),
            (_amplified_logits(base, head.module, ids, factor), head.shaped(products * factor).float()),
        ]
    # Both sides are products of the same matrices, which differ by rounding.
    tolerance = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 1e-2
    for expected, logits in pairs:
        if not bool(expected.isfinite().all()):
            raise ModelError(f"{name}: the logits of {type(base).__name__} are not finite in a test pass.")
        largest = float(expected.abs().max().clamp_min(1.0))
        if expected.shape != logits.shape or not torch.allclose(expected, logits, atol=tolerance * largest, rtol=1e-2):
            distance = f"{float((expected - logits).abs().max()):.3g}" if expected.shape == logits.shape else "in shape"
            raise ModelError(
                f"{name}: the logits of {type(base).__name__} are not its output head applied to its last hidden "
                f"states (they differ by {distance}). distillkit does not support this model."
            )


LARGE_LOGIT = 50.0
"""Largest product of hidden state and output embedding when `check_head` looks for a soft cap."""


def _amplified_logits(base: nn.Module, module: nn.Module, ids: Tensor, factor: float) -> Tensor:
    """The model's own logits `[T, V]` if all products of its output embedding were `factor` times as large."""
    handle = module.register_forward_hook(lambda _, __, products: products * factor)
    try:
        logits: Tensor = base(input_ids=ids, use_cache=False).logits[0].float()
        return logits
    finally:
        handle.remove()

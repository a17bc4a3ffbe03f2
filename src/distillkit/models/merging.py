"""Merging of adapters into the weights that they change."""

import sys
import warnings
from typing import TYPE_CHECKING

from torch import nn

from distillkit.models.copies import deep_copy
from distillkit.models.scoring import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_lora(model: nn.Module) -> nn.Module:
    """Returns the model without adapters, ready for `save_pretrained`.

    Where an adapter is on one of two tied embeddings, the merged copy has two separate ones: merged into the weights
    that both share, it would change the other one too.

    Args:
        model: A transformers causal language model, with LoRA adapters or without.

    Returns:
        `model` itself if it has no adapters, otherwise a merged copy: `model` is unchanged and training can continue.
    """
    if "peft" not in sys.modules:  # no model has adapters before that
        return model
    from peft import PeftModel  # here, for a fast start of the command line

    if not isinstance(model, PeftModel):
        return model
    adapted = deep_copy(model)
    if adapts_tied_embeddings(adapted):
        untie(base_model(adapted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # about what `untie` has done
        merged: nn.Module = adapted.merge_and_unload()  # type: ignore[operator]
    return merged


def adapts_tied_embeddings(model: nn.Module) -> bool:
    """True if a model has an adapter on its input or output embedding, and the two share their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [base_model(model).get_input_embeddings(), base_model(model).get_output_embeddings()]
    plain = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    return plain[0].weight is plain[1].weight and any(isinstance(layer, BaseTunerLayer) for layer in layers)


def untie(model: "PreTrainedModel") -> None:
    """Gives a model's output embedding weights that are separate from those of the input embedding, in place.

    Args:
        model: A transformers causal language model, whose embeddings may have adapters.
    """
    head = model.get_output_embeddings()
    layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False

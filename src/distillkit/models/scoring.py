"""From a transformers model to scores: hidden states at response positions, and the head that makes logits of them.

Letters: B rows, T tokens, N response positions, D hidden width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distillkit.errors import ModelError
from distillkit.heads import OutputHead
from distillkit.interfaces import Teacher
from distillkit.models import packing
from distillkit.types import Batch, Scores

_log = logging.getLogger(__name__)


def base_model(model: nn.Module) -> Any:
    """The transformers model, also where peft has wrapped it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def logits_width(model: nn.Module) -> int:
    """How many logits the model gives, padding of the vocabulary included."""
    head = base_model(model).get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: only causal language models can be used.")
    return int(head.weight.shape[0])


def share_vocab(student: nn.Module, teacher: Teacher | None, num_tokens: int, say: Callable[[str], None]) -> int:
    """Cuts the teacher to the logits that both models have.

    Args:
        student: A transformers causal language model.
        teacher: The teacher, set up; None leaves the student's logits.
        num_tokens: Tokens of the tokenizer that both share.
        say: Told if the widths differ.

    Returns:
        V, the number of logits that both have.

    Raises:
        ModelError: If the tokenizer has more tokens than that.
    """
    width = logits_width(student)
    vocab = width if teacher is None else min(width, teacher.vocab_size)
    if teacher is not None and width != teacher.vocab_size:
        say(f"The student has {width} logits and the teacher {teacher.vocab_size}: both are cut to {vocab}.")
    if num_tokens > vocab:
        raise ModelError(f"The tokenizer has {num_tokens} tokens and the models share {vocab} logits.")
    if teacher is not None:
        teacher.limit_vocab(vocab)
    return vocab


def output_head(model: nn.Module, vocab: int) -> OutputHead:
    """The model's head, cut to `vocab` tokens."""
    base = base_model(model)
    text = base.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return OutputHead(base.get_output_embeddings(), vocab, scale, getattr(text, "final_logit_softcapping", None))


def score(model: nn.Module, batch: Batch, vocab: int, budget: int | None = None) -> Scores:
    """Scores of the batch's response positions; prompt and padding positions never reach the head.

    Args:
        model: A transformers causal language model.
        batch: Rows; their packed form is used where `prepare_packing` found that the model can.
        vocab: V.
        budget: Bytes that a loss may hold at once for log-probabilities.
    """
    body, line = base_model(model).get_decoder(), batch.packed
    if line is not None and base_model(model).config.get_text_config()._attn_implementation == packing.NAME:
        with packing.packing():
            found = body(input_ids=line.input_ids, position_ids=line.position_ids, use_cache=False, line=line)
        hidden = found.last_hidden_state[0][line.positions]  # [L, D] -> [N, D]
    else:
        found = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        hidden = found.last_hidden_state.flatten(0, 1)[batch.positions]  # [B·T, D] -> [N, D]
    return Scores(hidden, output_head(model, vocab), vocab, budget=budget)


@torch.no_grad()
def prepare_packing(model: nn.Module, probe: Batch, name: str) -> bool:
    """Has the model take rows end to end, if that changes nothing.

    Args:
        model: A transformers causal language model, on the device that it will run on.
        probe: A small packed batch, which is scored both ways.
        name: What the log calls it.

    Returns:
        Whether the model is given packed rows from now on. If not the reason is logged, and it gets padded rows.
    """
    config = base_model(model).config.get_text_config()
    device = base_model(model).get_output_embeddings().weight.device
    probe = probe.to(device)
    with evaluating(model):
        padded = score(model, replace(probe, packed=None), 1).hidden.float()
        if not packing.install(config):
            _log.info("%s: attention %s takes padded rows", name, config._attn_implementation)
            return False
        try:
            found = score(model, probe, 1).hidden.float()
            gap = float((found - padded).norm() / padded.norm())
        except (TypeError, ValueError, RuntimeError) as error:
            packing.remove(config)
            _log.info("%s: padded rows, because packed ones fail: %s", name, str(error).splitlines()[0])
            return False
    if not gap < 0.05:  # rounding of many layers in bfloat16 stays below, another row's tokens do not
        packing.remove(config)
        _log.info("%s: padded rows, because packed ones change its hidden states by %.3g of their norm", name, gap)
        return False
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each submodule's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> None:
    """Refuses an architecture whose logits are not its last hidden states through its head.

    Args:
        model: The model, on the device that it will run on.
        name: What the error calls it.

    Raises:
        ModelError: If the model's own logits differ from those of `output_head`.
    """
    base = base_model(model)
    device = base.get_output_embeddings().weight.device
    ids = torch.arange(4, device=device)[None]  # [1, 4], any tokens do
    with evaluating(model):
        expected = base(input_ids=ids, use_cache=False).logits[0].float()
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        found = output_head(model, expected.shape[-1])(hidden).float()
    if not torch.allclose(expected, found, atol=1e-2 * float(expected.abs().max().clamp_min(1.0)), rtol=1e-2):
        raise ModelError(
            f"{name}: {type(base).__name__} computes its logits in a way that distillkit does not know, "
            f"they differ by {float((expected - found).abs().max()):.3g}."
        )

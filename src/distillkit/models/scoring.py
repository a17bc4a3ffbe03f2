"""From a transformers model to scores: hidden states at response positions, and the head that makes logits of them.

Letters: B rows, T tokens, N response positions, D hidden width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distillkit.errors import ModelError
from distillkit.heads import OutputHead
from distillkit.interfaces import Teacher
from distillkit.models import packing
from distillkit.types import Batch, Scores, Slicing

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


def score(model: nn.Module, batch: Batch, vocab: int, slicing: Slicing | None = None) -> Scores:
    """Scores of the batch's response positions; prompt and padding positions never reach the head.

    Args:
        model: A transformers causal language model.
        batch: Rows; their packed form is used if the model can take it.
        vocab: V.
        slicing: How a loss is run over them; None is as `Slicing` has it.
    """
    body, line = base_model(model).get_decoder(), batch.packed
    if line is not None and packs(model):
        hidden = packing.run(body, line)[line.positions]  # [L, D] -> [N, D]
    else:
        found = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        hidden = found.last_hidden_state.flatten(0, 1)[batch.positions]  # [B·T, D] -> [N, D]
    return Scores(hidden, output_head(model, vocab), vocab, slicing=slicing or Slicing())


def packs(model: nn.Module) -> bool:
    """Whether the model takes rows end to end. Found out the first time, by a small batch that is run both ways."""
    base = base_model(model)
    if not hasattr(base, _PACKS):
        with evaluating(model), torch.no_grad():
            device = base.get_output_embeddings().weight.device
            reason = packing.install(base.config.get_text_config(), base.get_decoder(), device)
        setattr(base, _PACKS, reason is None)
        if reason is not None:
            _log.info("%s is given padded rows: %s", type(base).__name__, reason)
    found: bool = getattr(base, _PACKS)
    return found


_PACKS = "_distillkit_packs"


def side_by_side(
    student: Callable[[], Scores], teacher: Callable[[], Scores] | None, device: torch.device
) -> tuple[Scores, Scores | None]:
    """Scores by both models; on a GPU each on a stream of its own.

    Args:
        student: Scores by the student.
        teacher: Scores by the teacher; None if there is none.
        device: Where they are.
    """
    if teacher is None or device.type != "cuda":
        return student(), None if teacher is None else teacher()
    here = torch.cuda.current_stream(device)
    beside = _streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        by_teacher = teacher()
    by_student = student()
    here.wait_stream(beside)
    for made in (by_teacher.hidden, by_teacher.support, by_teacher.own):
        if made is not None:
            made.record_stream(here)  # its memory must not be used again before `here` is done with it
    return by_student, by_teacher


_streams: dict[torch.device, torch.cuda.Stream] = {}


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

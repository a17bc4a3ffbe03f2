"""Scores from a transformers model: hidden states at response positions, with the model's output head.

Letters: B rows, T tokens, N response positions, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distillkit.devices import streams
from distillkit.errors import ModelError
from distillkit.interfaces import Teacher
from distillkit.models import packing
from distillkit.models.capabilities import capabilities
from distillkit.models.heads import logits_width, output_head
from distillkit.models.structure import base_model as base_model
from distillkit.models.structure import last_states, text_body
from distillkit.types import Batch, Scores, Slicing


def share_vocab(student: nn.Module, teacher: Teacher | None, num_tokens: int, log: Callable[[str], None]) -> int:
    """Limits the teacher to the logits that both models have.

    Args:
        student: A transformers causal language model.
        teacher: The teacher, after `setup`; None for a run without one.
        num_tokens: Number of tokens of the shared tokenizer that need logits.
        log: Called with a message if the widths differ.

    Returns:
        V, the number of logits that both have.

    Raises:
        ModelError: If the tokenizer has more tokens than both models have logits.
    """
    width = logits_width(student)
    vocab = width if teacher is None else min(width, teacher.vocab_size)
    if teacher is not None and width != teacher.vocab_size:
        log(f"The student has {width} logits and the teacher {teacher.vocab_size}: both are cut to {vocab}.")
    if num_tokens > vocab:
        raise ModelError(
            f"The tokenizer has {num_tokens} tokens and the models share {vocab} logits. If tokens were added to the "
            "tokenizer alone and never occur, set `model.added_tokens: unused`; else use the tokenizer that the models "
            "were trained with."
        )
    if teacher is not None:
        teacher.limit_vocab(vocab)
    return vocab


def score(model: nn.Module, batch: Batch, vocab: int, slicing: Slicing | None = None) -> Scores:
    """Scores of the batch's response positions; prompt and padding positions never reach the head.

    Args:
        model: A transformers causal language model.
        batch: The rows; their packed form is used if the model supports it.
        vocab: V, number of tokens that are scored.
        slicing: Memory and compilation of a loss over the scores; None is `Slicing()`.
    """
    packed, limits = batch.packed, capabilities(model).positions
    length = batch.input_ids.shape[1]
    limits.check(length, type(base_model(model)).__name__, "the longest row of a batch")
    # A row past the switch has other rotary frequencies than those before it.
    switched = limits.switch is not None and length > limits.switch
    if packed is not None and not switched and packs(model):
        hidden = packing.run(text_body(model), packed)[packed.positions]  # [L, D] -> [N, D]
    else:
        hidden = row_states(model, batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.positions]  # -> [N, D]
    head = output_head(model, vocab)
    return Scores(head.narrowed(hidden), head, vocab, slicing=slicing or Slicing())


def row_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states `[B, T, D]` of rows that are padded on the right, each as if it were run alone.

    Args:
        model: A transformers causal language model.
        input_ids: `[B, T]` token ids.
        attention_mask: `[B, T]` bool, True at every token that is not padding; states at padding are arbitrary.
    """
    ability, body, width = capabilities(model), text_body(model), input_ids.shape[1]
    switch = ability.positions.switch
    if ability.layout != "single" and (switch is None or width <= switch):
        return last_states(body, input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
    lengths = attention_mask.sum(-1).tolist()
    states: dict[int, Tensor] = {}
    for rows in batchable(lengths, ability.layout == "single", switch):
        longest = max(lengths[row] for row in rows)
        ids, mask = input_ids[rows, :longest], attention_mask[rows, :longest]
        hidden = last_states(body, input_ids=ids, attention_mask=mask.long(), use_cache=False)
        states |= dict(zip(rows, pad(hidden, (0, 0, 0, width - longest)), strict=True))
    return torch.stack([states[row] for row in range(len(lengths))])


def batchable(lengths: Sequence[int], single: bool, switch: int | None) -> list[list[int]]:
    """Indices of the rows that may be run as one batch: each alone, or those on the same side of the switch.

    Args:
        lengths: Tokens of each row.
        single: Whether rows must be run one at a time.
        switch: Length past which a row's rotary frequencies are others; None if there is none.
    """
    if single:
        return [[row] for row in range(len(lengths))]
    sides = [
        [row for row, length in enumerate(lengths) if (switch is not None and length > switch) is past]
        for past in (False, True)
    ]
    return [rows for rows in sides if rows]


def packs(model: nn.Module) -> bool:
    """True if the model supports packed rows."""
    return capabilities(model).layout == "packed"


def side_by_side(
    student: Callable[[], Scores], teacher: Callable[[], Scores] | None, device: torch.device, in_turn: bool = False
) -> tuple[Scores, Scores | None]:
    """Scores of both models; on a GPU each model runs on its own stream.

    Args:
        student: Computes the student's scores.
        teacher: Computes the teacher's scores; None without a teacher.
        device: Device of both models.
        in_turn: Whether both run on the same stream, one after the other.
    """
    backend = streams.backend(device)
    if teacher is None or backend is None or in_turn:
        return student(), None if teacher is None else teacher()
    main, side = backend.current_stream(device), streams.side_stream(device, "teacher")
    side.wait_stream(main)
    with backend.stream(side):
        teacher_scores = teacher()
    student_scores = student()
    main.wait_stream(side)
    # The allocator reuses the teacher's memory on `side` alone, and `side` waits for `main` before its next use.
    return student_scores, teacher_scores

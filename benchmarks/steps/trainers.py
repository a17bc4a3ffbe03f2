"""The training loops that `step.py` compares, and the plainest of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distillkit.data import Layout
from steps import with_distillkit, with_trl
from steps.clock import StepClock
from steps.workload import ADAMW, Example, Setup, examples, load_model, load_tokenizer


def textbook(setup: Setup, clock: StepClock) -> None:
    """Both models' logits of every position, padded on the right; KL(p‖q) of all, then the mask; its mean."""
    student, teacher = load_model(setup, "student").train(), load_model(setup, "teacher").eval()
    optimizer = torch.optim.AdamW(student.parameters(), **ADAMW)
    rows, pad = examples(setup), load_tokenizer(setup).pad_token_id
    for start in range(0, len(rows), setup.rows):
        clock.begin()
        ids, attention, trained = (
            tensor.to(setup.device) for tensor in _padded(rows[start : start + setup.rows], pad)
        )  # [B, T] each
        with torch.autocast(setup.device, torch.bfloat16, enabled=setup.mixed):
            with torch.no_grad():
                p_logits = teacher(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
            q_logits = student(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
            logp, logq = (logits.float().log_softmax(-1) for logits in (p_logits, q_logits))  # [B, T-1, V]
            kl = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)  # [B, T-1] nats
            loss = (kl * trained[:, 1:]).sum() / trained.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end(loss)


def _padded(rows: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and mask of the response tokens, `[B, T]` each."""
    length = max(len(row.prompt) + len(row.response) for row in rows)
    ids = torch.full((len(rows), length), pad)
    attention, trained = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, response, *_) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        trained[row, len(prompt) : end] = 1
    return ids, attention, trained


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Args:
        run: The loop.
        options: Its keyword arguments.
        needs: A module that must be importable.
        fills: Whether a first run writes what the measured ones read.
    """

    run: Callable[..., None]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    fills: bool = False


VARIANTS: dict[str, Variant] = {
    "textbook": Variant(textbook),
    "trl-gkd": Variant(with_trl.gkd, needs="trl"),
    "trl-distillation": Variant(with_trl.distillation, needs="trl"),
    "distillkit": Variant(with_distillkit.fit),
    "distillkit-cached": Variant(with_distillkit.fit, {"cached": True}, fills=True),
    "distillkit-packed": Variant(with_distillkit.fit, {"layout": "packed"}),
    "distillkit-padded": Variant(with_distillkit.fit, {"layout": "padded"}),
}

LAYOUTS: dict[Layout, str] = {"padded": "distillkit-padded", "packed": "distillkit-packed", "shared": "distillkit"}
"""The variants that differ in the layout of a batch alone."""

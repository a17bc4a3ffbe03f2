"""The number on each method's page is what the method's own loss gives."""

from collections.abc import Sequence

import pytest
import torch

from distillkit.data.collate import collate
from distillkit.interfaces import Loss
from distillkit.losses import DPKD, CrossEntropy, DistiLLM2, ForwardKL, GeneralizedJSD, ReverseKL, SkewKL
from distillkit.types import Row, Scores
from helpers.docs import ROOT

P, Q = (0.5, 0.5), (0.25, 0.75)
"""What teacher and student say at every position."""


def value(loss: Loss, writers: Sequence[str]) -> float:
    """The loss of a response by each of `writers`: the token 0 of two; of the student's own, the token 1."""
    rows = [Row((1, int(writer == "student")), (False, True), writer, "a prompt") for writer in writers]
    batch = collate(rows, pad_id=0)
    p, q = (torch.tensor([own] * len(rows), dtype=torch.float64).log() for own in (P, Q))
    output = loss(Scores.from_logits(q), Scores.from_logits(p), batch)
    return float((output.total / output.units).sum())


PAGES: dict[str, tuple[Loss, Sequence[str]]] = {
    "sft": (CrossEntropy(), ["dataset"]),
    "seqkd": (CrossEntropy(), ["teacher"]),
    "kd": (ForwardKL(), ["dataset"]),
    "speculative_kd": (ForwardKL(), ["speculative"]),
    "speculative_kd-on-policy": (ForwardKL(), ["speculative"]),
    "rkl": (ReverseKL(), ["student"]),
    "skl": (SkewKL(0.1), ["dataset"]),
    "gkd": (GeneralizedJSD(0.5), ["student"]),
    "imitkd": (ForwardKL(), ["student"]),
    "dpkd": (DPKD(0.2), ["teacher", "student"]),
    "distillm2": (DistiLLM2(alpha=0.1, beta=0.5), ["teacher", "student"]),
    "distillm2-as-released": (DistiLLM2(alpha=0.1, beta=0.5, detach_mixture=True), ["teacher", "student"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_number_on_a_page_is_that_of_its_loss(name: str) -> None:
    loss, writers = PAGES[name]
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    _, pinned, sentence = text.partition("Pinned: ")
    assert pinned, "each page has a number that a test pins"
    assert f"{value(loss, writers):.6f}" in sentence.partition("\n\n")[0]


def test_every_page_has_a_number() -> None:
    pages = list((ROOT / "docs" / "methods").glob("*.md"))
    assert len(pages) > 18
    assert [page.name for page in pages if "Pinned: " not in page.read_text()] == []

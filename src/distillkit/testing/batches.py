"""Small random batches for tests, collated as in training."""

from collections.abc import Sequence

import torch

from distillkit.data.collate import collate
from distillkit.types import Batch, Row


def make_rows(
    lengths: Sequence[int],
    writers: Sequence[str],
    pairs: Sequence[int],
    vocab: int,
    seed: int = 0,
    prompt_seed: int | None = None,
) -> list[Row]:
    """Rows of random tokens: a prompt of 1 to 4 tokens, then the response.

    Args:
        lengths: Number of response tokens of each row, at least 0.
        writers: Writer of each row's response.
        pairs: Index of the prompt that each row answers.
        vocab: Tokens are sampled from `0 … vocab − 1`.
        seed: Seed of the responses.
        prompt_seed: Seed of the prompts and their lengths; None is `seed`. Each row has its own prompt.

    Returns:
        One row per length.
    """
    responses = torch.Generator().manual_seed(seed)
    prompts = torch.Generator().manual_seed(seed if prompt_seed is None else prompt_seed)
    rows = []
    for length, writer, pair in zip(lengths, writers, pairs, strict=True):
        prompt_length = int(torch.randint(1, 5, (), generator=prompts))
        prompt = torch.randint(vocab, (prompt_length,), generator=prompts)
        response = torch.randint(vocab, (length,), generator=responses)
        rows.append(
            Row(
                input_ids=(*prompt.tolist(), *response.tolist()),
                response_mask=(False,) * prompt_length + (True,) * length,
                writer=writer,
                prompt_id=str(pair),
            )
        )
    return rows


def make_batch(
    lengths: Sequence[int],
    writers: Sequence[str],
    pairs: Sequence[int],
    vocab: int,
    seed: int = 0,
    prompt_seed: int | None = None,
) -> Batch:
    """A batch of the rows of `make_rows`, padded with token 0.

    Args:
        lengths: Number of response tokens of each row, at least 0.
        writers: Writer of each row's response.
        pairs: Index of the prompt that each row answers.
        vocab: Tokens are sampled from `0 … vocab − 1`.
        seed: Seed of the responses.
        prompt_seed: Seed of the prompts and their lengths; None is `seed`.
    """
    return collate(make_rows(lengths, writers, pairs, vocab, seed, prompt_seed), pad_id=0)

"""Letters: L tokens of a line, H query heads, G key heads, d head width."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from distillkit.data.collate import collate
from distillkit.models import packing
from distillkit.models.scoring import packs
from distillkit.types import Row
from helpers.batches import END_TO_END, FILLED, SHARED, VOCAB, dense
from helpers.models import tiny_model

LONG = [
    Row(ids, (False, *[True] * (len(ids) - 1)), "teacher", name)
    for name, group in {
        "a": [tuple(range(100)) + tuple(range(40)), tuple(range(100)) + tuple(range(50, 120))],
        "b": [tuple(range(30))],
        "c": [tuple(range(5)), tuple(range(60)), tuple(range(5, 35))],
        "d": [tuple(range(200, 340)), tuple(range(200, 290)), (*range(200, 300), 3, 4)],
    }.items()
    for ids in group
]
LINES = {
    "short": SHARED.packed,
    "end to end": END_TO_END.packed,
    "filled up": FILLED.packed,
    "long": collate(LONG, pad_id=0, bucket=16).packed,
}
every_line = pytest.mark.parametrize("line", LINES.values(), ids=LINES)
every_window = pytest.mark.parametrize("window", [None, 1, 3, 20, 1000])


def as_matrix(mask, length):
    """What a flex mask allows, `[L, L]`."""
    places = torch.arange(length)
    return mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None, :])


@every_line
@every_window
def test_the_flex_mask_says_what_the_segments_say(line, window):
    line, length = replace(line, masks={}), line.input_ids.shape[1]
    mask, expected = packing.block_mask(line, window), dense(line, window)
    assert torch.equal(as_matrix(mask, length), expected)
    # A block is left out if and only if nobody in it is seen.
    size, blocks = mask.BLOCK_SIZE[0], -(-length // mask.BLOCK_SIZE[0])
    room = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    room[:length, :length] = expected
    expected_blocks = room.view(blocks, size, blocks, size).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), expected_blocks)
    assert packing.block_mask(line, window) is mask  # made once


def test_the_long_line_has_blocks_that_are_left_out():
    mask = packing.block_mask(replace(LINES["long"], masks={}), None)
    found = mask.to_dense()[0, 0]
    assert found.shape[0] > 3
    assert not found.tril().bool().equal(torch.ones_like(found).tril().bool())


def qkv(length, heads=4, key_heads=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, length, width) for number in (heads, key_heads, key_heads)]
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_dense_matrix(query, key, value, seen, scaling=None, softcap=None):
    """Attention `[1, L, H, d]` by one matrix of scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (own.repeat_interleave(group, dim=1) for own in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@every_line
@every_window
@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.7, None), (None, 2.0), (0.7, 5.0)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_over_a_line_is_that_of_one_matrix(line, window, scaling, softcap, key_heads):
    query, key, value = qkv(line.input_ids.shape[1], key_heads=key_heads)
    options = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
    found, weights = packing.attention(nn.Identity(), query, key, value, None, packed=line, **options)
    expected = by_dense_matrix(query, key, value, dense(line, window), scaling, softcap)
    assert weights is None
    # The weights of capped scores are a softmax in float32, as transformers takes it.
    tolerance = 1e-12 if softcap is None else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_line
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_mask_gives_what_the_segments_give(line, window):
    query, key, value = qkv(line.input_ids.shape[1], dtype=torch.float32)
    mask = packing.block_mask(replace(line, masks={}), window)
    by_flex = flex_attention(query, key, value, block_mask=mask, scale=0.4, enable_gqa=True)
    options = {"scaling": 0.4, "sliding_window": window}
    found, _ = packing.attention(nn.Identity(), query, key, value, None, packed=line, **options)
    torch.testing.assert_close(found, by_flex.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_no_token_sees_another_row():
    # A change of a token moves the hidden states of those that see it, and of no others.
    model = tiny_model(VOCAB)
    line = SHARED.packed
    assert packs(model)
    seen, body = dense(line), model.get_decoder()
    with torch.no_grad():
        before = packing.run(body, line)
        for place in range(0, line.input_ids.shape[1], 7):
            ids = line.input_ids.clone()
            ids[0, place] = (ids[0, place] + 1) % VOCAB
            moved = (packing.run(body, replace(line, input_ids=ids)) - before).abs().amax(-1)
            assert torch.equal(moved > 1e-4, seen[:, place])
            assert (moved[~seen[:, place]] == 0).all()


@pytest.mark.parametrize("num_queries", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_call_leaves_shared_heads_as_they_are(num_queries, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, num_queries, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, 2, 9, 8, generator=generator).to(dtype) for _ in range(2))
    mask = (torch.arange(9) >= torch.tensor([0, 3, 5])[:, None])[:, None, None].expand(3, 1, num_queries, 9)
    repeated = (heads.repeat_interleave(3, dim=1) for heads in (key, value))
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    layer = nn.Module()
    layer.num_key_value_groups = 3
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("the cache was copied"))
    attended, _ = packing.attention(layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(attended, expected.transpose(1, 2))

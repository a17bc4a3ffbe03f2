import pytest
import torch
from transformers import Gemma2Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from distillkit.generators.kv_cache import HEADROOM, PreallocatedLayer, preallocated_cache
from helpers.models import tiny_model


def drawn(rows, tokens, generator):
    return torch.randn(rows, 2, tokens, 4, generator=generator)


@pytest.mark.parametrize("kept", [[0, 1, 2, 4], [4, 1], [3], [1, 0, 2], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("first", [3, 2 * HEADROOM])
def test_holds_what_transformers_own_layer_holds(first, kept):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    rows = 5
    for step, tokens in enumerate([first, *[1] * (2 * HEADROOM)]):
        keys, values = drawn(rows, tokens, generator), drawn(rows, tokens, generator)
        for found, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        if step in (2, HEADROOM + 1):
            index = torch.tensor([place for place in kept if place < rows] or [0])
            ours.batch_select_indices(index)
            theirs.batch_select_indices(index)
            rows = len(index)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_is_written_without_moving_those_before_it():
    layer, generator = PreallocatedLayer(), torch.Generator().manual_seed(0)
    layer.update(drawn(2, 3, generator), drawn(2, 3, generator))
    places = set()
    for _ in range(HEADROOM):
        layer.update(drawn(2, 1, generator), drawn(2, 1, generator))
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


def test_layers_of_a_window_stay_transformers_own():
    config = Gemma2Config(num_hidden_layers=4, sliding_window=4)
    kinds = {type(layer) for layer in preallocated_cache(config).layers}
    assert kinds == {PreallocatedLayer, DynamicSlidingWindowLayer}
    assert {type(layer) for layer in preallocated_cache(tiny_model().config).layers} == {PreallocatedLayer}

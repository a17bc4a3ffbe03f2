import random

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from distillkit.data.collate import collate
from distillkit.errors import DataError
from distillkit.types import Row

T, F = True, False


def test_rows_are_padded_on_the_right_and_pairs_numbered_in_order_of_appearance():
    rows = [
        Row((1, 2, 3), (F, T, T), "teacher", "b"),
        Row((4, 5), (F, T), "student", "b"),
        Row((6, 7, 8, 9), (F, F, F, T), "teacher", "a"),
        Row((6, 7), (F, F), "student", "a"),
    ]

    batch = collate(rows, pad_id=0)

    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [6, 7, 0, 0]]
    assert batch.attention_mask.tolist() == [[T, T, T, F], [T, T, F, F], [T, T, T, T], [T, T, F, F]]
    assert batch.response_mask.tolist() == [[F, T, T, F], [F, T, F, F], [F, F, F, T], [F, F, F, F]]
    assert batch.positions.tolist() == [0, 1, 4, 10]
    assert batch.targets.tolist() == [2, 3, 5, 9]
    assert batch.rows.tolist() == [0, 0, 1, 2]
    assert batch.lengths == (2, 1, 1, 0)
    assert batch.num_tokens == 4
    assert batch.writer == ("teacher", "student", "teacher", "student")
    assert batch.pair == (0, 0, 1, 1)
    assert batch.window is None


def test_tensors_have_the_types_that_models_and_losses_expect():
    batch = collate([Row((1, 2), (F, T), "dataset", "a")], pad_id=0)

    assert batch.input_ids.dtype == torch.long
    assert batch.attention_mask.dtype == batch.response_mask.dtype == torch.bool


def test_a_row_that_contains_the_padding_token_is_attended_to_and_trained_on():
    end = pad = 9  # many models pad with their end-of-turn token

    batch = collate([Row((1, end, 2, end), (F, F, T, T), "dataset", "a"), Row((1, 2), (F, T), "dataset", "b")], pad)

    assert batch.attention_mask.tolist() == [[T, T, T, T], [T, T, F, F]]
    assert batch.targets.tolist() == [2, end, 2]


def test_padding_and_prompts_are_never_trained_on():
    draw = random.Random(0)
    for _ in range(20):
        rows = []
        for number in range(draw.randint(1, 5)):
            length = draw.randint(1, 8)
            mask = (F, *(draw.random() < 0.5 for _ in range(length - 1)))
            rows.append(Row(tuple(draw.randrange(4) for _ in range(length)), mask, "student", str(number % 2)))
        expected = [row.input_ids[t] for row in rows for t in range(len(row.input_ids)) if row.response_mask[t]]

        batch = collate(rows, pad_id=draw.randrange(4))

        assert batch.targets.tolist() == expected
        assert not (batch.response_mask & ~batch.attention_mask).any()
        assert batch.attention_mask.sum(1).tolist() == [len(row.input_ids) for row in rows]


@pytest.mark.parametrize(("ids", "mask"), [((1, 2), (F,)), ((1,), (F, T)), ((), ())])
def test_a_row_whose_mask_does_not_fit_is_refused(ids, mask):
    with pytest.raises(DataError, match=rf"student row of prompt abc has {len(ids)} tokens and a response mask"):
        collate([Row(ids, mask, "student", "abc")], pad_id=0)


def test_a_row_that_trains_on_its_first_token_is_refused():
    with pytest.raises(DataError, match="first token"):
        collate([Row((1, 2), (T, T), "student", "a")], pad_id=0)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_lightning_may_rebuild_a_batch_in_half_precision(layout):
    batch = collate([Row((1, 2, 3), (F, T, T), "teacher", "a"), Row((1, 4), (F, T), "student", "a")], 0, layout)
    found = HalfPrecision("bf16-true").convert_input(batch)
    assert found.keys == batch.keys
    assert torch.equal(found.input_ids, batch.input_ids)
    assert (found.packed is None) == (layout == "padded")
    assert found.packed is None or found.packed.segments == batch.packed.segments

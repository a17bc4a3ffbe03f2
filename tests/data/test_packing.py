"""Letters: L tokens of a line, N response positions."""

import random

import pytest
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection

from distillkit.data.collate import collate
from distillkit.data.packing import pack
from distillkit.types import Row, Segment

T, F = True, False


def row(ids, prompt=1, pair="a", mask=None, writer="teacher"):
    """A row whose tokens after the prompt are trained on."""
    ids = tuple(ids)
    mask = (F,) * prompt + (T,) * (len(ids) - prompt) if mask is None else tuple(c == "1" for c in mask)
    return Row(ids, mask, writer, pair)


def seen_by(line, place):
    """Places in the line that a token sees, itself last, as the segments say."""
    (segment,) = (own for own in line.segments if own.start <= place < own.stop)
    return [*range(segment.first, segment.last), *range(segment.start, place + 1)]


def assert_each_token_sees_its_row(rows, batch):
    """What each predicting token sees is its row up to the trained token, at places that count from 0."""
    line = batch.packed
    tokens, places = line.input_ids[0].tolist(), line.position_ids[0].tolist()
    expected = [own.input_ids[:t] for own in rows for t in range(len(own.input_ids)) if own.response_mask[t]]
    found = [seen_by(line, place) for place in line.positions.tolist()]
    assert [tuple(tokens[place] for place in seen) for seen in found] == expected
    assert [[places[place] for place in seen] for seen in found] == [list(range(len(seen))) for seen in found]
    targets = [own.input_ids[t] for own in rows for t in range(len(own.input_ids)) if own.response_mask[t]]
    assert batch.targets.tolist() == targets
    assert line.input_ids.shape == line.position_ids.shape == (1, len(tokens))
    assert {own.dtype for own in (line.input_ids, line.position_ids, line.positions)} == {torch.long}


def assert_segments_cover(line):
    """They lie end to end, and what they see besides lies before them and is one whole segment."""
    borders = [0, *(own.stop for own in line.segments)]
    assert [own.start for own in line.segments] == borders[:-1]
    assert borders[-1] == line.input_ids.shape[1]
    wholes = {(own.start, own.stop) for own in line.segments}
    for own in line.segments:
        assert own.stop > own.start
        assert own.first == own.last or ((own.first, own.last) in wholes and own.last <= own.start)


def test_a_pair_shares_its_prompt():
    rows = [row([1, 2, 3, 4], prompt=2), row([1, 2, 5, 6, 7], prompt=2)]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert line.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert line.segments == (Segment(0, 2, 0, 0), Segment(2, 4, 0, 2), Segment(4, 7, 0, 2))
    # 3 and 5 are both predicted by the prompt's last token.
    assert line.positions.tolist() == [1, 2, 1, 4, 5]


def test_rows_share_what_they_begin_with_also_beyond_the_prompt():
    rows = [row([1, 2, 3, 9, 4], prompt=2), row([1, 2, 3, 9, 5], prompt=2)]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 9, 4, 5]]
    assert line.segments == (Segment(0, 4, 0, 0), Segment(4, 5, 0, 4), Segment(5, 6, 0, 4))
    assert line.positions.tolist() == [1, 2, 3, 1, 2, 3]


def test_a_row_that_another_begins_with_has_no_tokens_of_its_own():
    rows = [row([1, 2, 3]), row([1, 2, 3, 4, 5])]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert line.segments == (Segment(0, 3, 0, 0), Segment(3, 5, 0, 3))
    assert line.positions.tolist() == [0, 1, 0, 1, 2, 3]
    assert collate(rows[::-1], pad_id=0).packed.positions.tolist() == [0, 1, 2, 3, 0, 1]


def test_equal_rows_stand_once():
    line = collate([row([1, 2, 3])] * 3, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3]]
    assert line.segments == (Segment(0, 3, 0, 0),)
    assert line.positions.tolist() == [0, 1] * 3


def test_a_group_of_one_shares_nothing():
    rows = [row([1, 2, 3], pair="a"), row([1, 2, 4], pair="b")]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 1, 2, 4]]
    assert line.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert [(own.start, own.stop) for own in line.segments] == [(0, 3), (3, 6)]
    assert all(own.first == own.last for own in line.segments)
    assert line.positions.tolist() == [0, 1, 3, 4]


def test_rows_of_a_prompt_that_begin_differently_share_nothing():
    rows = [row([1, 2, 3]), row([4, 2, 3])]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 4, 2, 3]]
    assert all(own.first == own.last for own in line.segments)
    assert_segments_cover(line)


def test_more_than_two_rows_share_what_all_of_them_begin_with():
    rows = [row([1, 2, 3, 4]), row([1, 2, 3, 5]), row([1, 2, 6])]
    line = collate(rows, pad_id=0).packed
    assert line.input_ids.tolist() == [[1, 2, 3, 4, 3, 5, 6]]
    assert line.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 2]]
    assert [tuple(own) for own in line.segments] == [(0, 2, 0, 0), (2, 4, 0, 2), (4, 6, 0, 2), (6, 7, 0, 2)]


def test_rows_of_a_prompt_are_brought_together_and_positions_keep_the_rows_order():
    rows = [row([1, 2, 3], pair="a"), row([7, 8], pair="b"), row([1, 2, 4], pair="a"), row([7, 9], pair="b")]
    batch = collate(rows, pad_id=0)
    assert batch.packed.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 9]]
    assert batch.packed.positions.tolist() == [0, 1, 4, 0, 1, 4]
    assert batch.targets.tolist() == [2, 3, 8, 2, 4, 9]


def test_a_row_without_trained_tokens_has_no_position_and_is_seen_all_the_same():
    rows = [row([1, 2, 3], mask="000"), row([1, 4], mask="01"), row([5], mask="0", pair="b")]
    batch = collate(rows, pad_id=0)
    assert batch.packed.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.packed.positions.tolist() == [0]
    assert collate(rows[:1], pad_id=0).packed.positions.shape == (0,)


def test_several_turns_are_trained_on_where_the_mask_says():
    rows = [row([1, 2, 3, 4, 5, 6], mask="001001"), row([1, 2, 3, 7], mask="0010")]
    batch = collate(rows, pad_id=0)
    assert batch.packed.positions.tolist() == [1, 4, 1]
    assert_each_token_sees_its_row(rows, batch)


def test_packed_lays_rows_end_to_end_without_sharing():
    rows = [row([1, 2, 3, 4], prompt=2), row([1, 2, 5], prompt=2), row([1, 2, 3, 4], prompt=2)]
    batch = collate(rows, pad_id=0, layout="packed")
    assert batch.packed.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4]]
    assert batch.packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]
    assert all(own.first == own.last for own in batch.packed.segments)
    assert_segments_cover(batch.packed)
    assert_each_token_sees_its_row(rows, batch)


def test_padded_has_no_line():
    rows = [row([1, 2, 3]), row([1, 4])]
    padded, shared = (collate(rows, pad_id=0, layout=layout) for layout in ("padded", "shared"))
    assert padded.packed is None
    for name in ("input_ids", "attention_mask", "response_mask", "positions", "targets", "rows"):
        assert torch.equal(getattr(padded, name), getattr(shared, name))


@pytest.mark.parametrize("bucket", [1, 4, 7, 64])
def test_a_line_is_filled_up_to_a_multiple_by_a_row_that_nothing_sees(bucket):
    rows = [row([1, 2, 3, 4]), row([1, 2, 5])]
    plain, filled = collate(rows, pad_id=9).packed, collate(rows, pad_id=9, bucket=bucket).packed
    length = plain.input_ids.shape[1]
    assert filled.input_ids.shape[1] == -(-length // bucket) * bucket
    assert torch.equal(filled.input_ids[:, :length], plain.input_ids)
    assert torch.equal(filled.positions, plain.positions)
    rest = filled.input_ids[0, length:].tolist()
    assert rest == [9] * len(rest)
    # No position that the rows don't have: a learned one could be past the model's last.
    assert filled.position_ids[0, length:].tolist() == [index % 4 for index in range(len(rest))]
    assert filled.segments[: len(plain.segments)] == plain.segments
    assert_segments_cover(filled)
    assert all(own.last <= length for own in filled.segments)


def shared_beginning(group):
    """How many tokens all rows of a group begin with."""
    return max(number for number in range(min(map(len, group)) + 1) if len({ids[:number] for ids in group}) == 1)


def random_rows(draw):
    """Rows of a few prompts in any order; few kinds of tokens, so that rows share much and are often equal."""
    rows = []
    prompts = [[draw.randrange(3) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 3))]
    for _ in range(draw.randint(1, 8)):
        number = draw.randrange(len(prompts))
        ids = prompts[number] + [draw.randrange(2) for _ in range(draw.randint(0, 5))]
        mask = (F, *(draw.random() < 0.7 for _ in ids[1:]))
        rows.append(Row(tuple(ids), mask, "student", str(number)))
    return rows


def test_each_token_of_any_rows_sees_its_row_and_no_token_stands_twice_for_nothing():
    draw, shared_rows, lone_prefixes = random.Random(0), 0, 0
    for _ in range(300):
        rows = random_rows(draw)
        for layout in ("shared", "packed"):
            batch = collate(rows, pad_id=0, layout=layout, bucket=draw.choice([1, 1, 8]))
            assert_segments_cover(batch.packed)
            assert_each_token_sees_its_row(rows, batch)
        groups = [[own.input_ids for own in rows if own.prompt_id == name] for name in {own.prompt_id for own in rows}]
        saved = sum((len(group) - 1) * shared_beginning(group) for group in groups)
        line = pack(rows, collate(rows, pad_id=0).pair, share=True)
        assert line.input_ids.shape[1] == sum(len(own.input_ids) for own in rows) - saved
        shared_rows += sum(own.first < own.last for own in line.segments)
        lone_prefixes += any(shared_beginning(group) == min(map(len, group)) for group in groups)
    assert shared_rows > 300, "the rows must share something for the test to say something"
    assert lone_prefixes > 50


def test_the_line_moves_with_its_batch():
    batch = collate([row([1, 2, 3]), row([1, 4])], pad_id=0)
    batch.packed.masks[None] = "made for the CPU"
    moved = batch.to("meta")
    names = ("input_ids", "position_ids", "positions")
    assert {getattr(moved.packed, name).device.type for name in names} == {"meta"}
    assert {getattr(batch.packed, name).device.type for name in names} == {"cpu"}
    assert moved.packed.segments == batch.packed.segments
    assert moved.packed.masks == {}
    assert collate([row([1, 2, 3])], pad_id=0, layout="padded").to("meta").packed is None


def test_the_line_is_pinned_with_its_batch(monkeypatch):
    pinned = []

    def pin_memory(self):
        pinned.append(self)
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    batch = collate([row([1, 2, 3]), row([1, 4])], pad_id=0)
    found = batch.pin_memory()
    assert len(pinned) == 9  # six of the batch, three of the line
    for name in ("input_ids", "position_ids", "positions"):
        ours, theirs = getattr(batch.packed, name), getattr(found.packed, name)
        assert torch.equal(ours, theirs)
        assert theirs is not ours
        assert any(own is ours for own in pinned)
    assert found.packed.segments == batch.packed.segments
    assert collate([row([1, 2, 3])], pad_id=0, layout="padded").pin_memory().packed is None


def test_lightning_can_rebuild_a_batch_with_its_line():
    # It does so for each batch where it trains in half precision.
    batch = collate([row([1, 2, 3]), row([1, 4])], pad_id=0)
    found = apply_to_collection(batch, torch.Tensor, torch.clone)
    assert torch.equal(found.packed.input_ids, batch.packed.input_ids)
    assert found.packed.input_ids is not batch.packed.input_ids
    assert found.packed.segments == batch.packed.segments
    assert all(isinstance(own, Segment) for own in found.packed.segments)

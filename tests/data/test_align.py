import pytest
import torch

from distillkit.data.align import response_positions
from distillkit.errors import DataError


def test_each_marked_token_is_predicted_by_the_position_before_it():
    input_ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    mask = torch.tensor([[False, False, True, True], [False, True, False, True]])

    found = response_positions(input_ids, mask)

    # Row 0: tokens 12 and 13 are predicted in columns 1 and 2. Row 1 starts at 4: 21 and 23 in columns 0 and 2.
    assert found.positions.tolist() == [1, 2, 4, 6]
    assert found.targets.tolist() == [12, 13, 21, 23]
    assert found.rows.tolist() == [0, 0, 1, 1]
    assert found.lengths == (2, 2)


def test_a_row_that_trains_on_nothing_has_length_zero():
    input_ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    mask = torch.tensor([[False, False], [False, True], [False, False]])

    found = response_positions(input_ids, mask)

    assert found.positions.tolist() == [2]
    assert found.targets.tolist() == [4]
    assert found.rows.tolist() == [1]
    assert found.lengths == (0, 1, 0)


@pytest.mark.parametrize("width", [1, 3])
def test_a_batch_that_trains_on_nothing_has_empty_tensors_of_the_same_types(width):
    found = response_positions(torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool))

    assert [tensor.shape for tensor in found[:3]] == [(0,)] * 3
    assert {tensor.dtype for tensor in found[:3]} == {torch.long}
    assert found.lengths == (0, 0)


def test_the_positions_agree_with_a_loop_over_every_token():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows, columns = torch.randint(1, 6, (2,), generator=generator).tolist()
        input_ids = torch.randint(0, 3, (rows, columns), generator=generator)
        mask = torch.rand(rows, columns, generator=generator) < 0.5
        mask[:, 0] = False
        marked = [(row, column) for row in range(rows) for column in range(columns) if mask[row, column]]

        found = response_positions(input_ids, mask)

        assert found.positions.tolist() == [row * columns + column - 1 for row, column in marked]
        assert found.targets.tolist() == [int(input_ids[place]) for place in marked]
        assert found.rows.tolist() == [row for row, _ in marked]
        assert list(found.lengths) == [sum(row == number for row, _ in marked) for number in range(rows)]


def test_a_marked_first_token_is_refused():
    mask = torch.tensor([[False, True], [True, False]])

    with pytest.raises(DataError, match="Row 1 of the batch trains on its first token"):
        response_positions(torch.zeros(2, 2, dtype=torch.long), mask)

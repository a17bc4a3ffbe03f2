"""Rows that are longer than a model's positions."""

import logging

import pytest
import torch

from distillkit.data.collate import collate
from distillkit.errors import ModelError
from distillkit.models.capabilities import capabilities
from distillkit.models.positions import Positions
from distillkit.models.scoring import score
from distillkit.testing.families import POSITIONS, VOCAB, tiny_family
from distillkit.testing.family_checks import check_generation, check_scores, make_rows, plain_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": 10,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "biogpt", "ctrl", "gptj", "codegen", "xglm", "bart"])
def test_tables_of_positions_are_measured(name):
    assert capabilities(tiny_family(name)).positions.table == POSITIONS


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "gpt_neox", "mpt", "gemma3_text"])
def test_models_without_a_table_have_no_limit(name):
    assert capabilities(tiny_family(name)).positions.table is None


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_row_past_the_last_position_is_refused_where_transformers_raises_an_index_error(name, layout):
    model, (row,) = tiny_family(name), make_rows([(5, POSITIONS - 5)])
    score(model, collate([row], 0, layout), VOCAB)
    (row,) = make_rows([(5, POSITIONS - 4)])
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([row.input_ids]))
    with pytest.raises(ModelError, match="has 64 positions, and the longest row of a batch takes 65"):
        score(model, collate([row], 0, layout), VOCAB)


def test_padding_of_a_bucket_takes_no_positions_of_its_own():
    model = tiny_family("gpt2")
    batch = collate(make_rows([(5, 5)]), 0, bucket=2 * POSITIONS)
    assert batch.packed.input_ids.shape[1] == 2 * POSITIONS
    score(model, batch, VOCAB)


def test_limits_are_checked_in_words():
    positions = Positions(table=None, configured=100, dynamic=50)
    assert positions.check(50, "the teacher", "the longest row") is None
    with pytest.raises(ModelError, match=r"the teacher scales its rotary positions .* past 50 tokens"):
        positions.check(51, "the teacher", "the longest row")
    warning = Positions(configured=100).check(101, "the teacher", "the longest row")
    assert warning == (
        "the teacher was made for 100 positions (max_position_embeddings), and the longest row takes 101: expect poor "
        "predictions past them."
    )


# Rotary frequencies that change with the length of a row.


def test_rows_on_both_sides_of_the_switch_are_scored_as_they_are_alone():
    model = tiny_family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=10)
    assert capabilities(model).positions.switch == 10
    assert {len(row.input_ids) > 10 for row in make_rows()} == {True, False}
    check_scores(model, plain_model(model))


def test_responses_that_pass_the_switch_are_generated_as_they_are_alone():
    model = tiny_family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=10)
    check_generation(model, plain_model(model))


def test_the_switch_matters():
    # A batch that is run as one has the long factors in its short rows too.
    model = tiny_family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=10)
    short, long = make_rows([(3, 5), (3, 12)])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.input_ids) for row in (short, long)], batch_first=True)
    with torch.no_grad():
        alone, together = (model(input_ids=rows).logits[0, :8] for rows in (ids[:1, :8], ids))
    assert (alone - together).abs().max() > 0.1


def test_frequencies_that_change_with_each_length_are_refused_where_they_do():
    model = tiny_family("llama", rope_parameters=DYNAMIC, max_position_embeddings=16)
    fitting, longer = collate(make_rows([(5, 11), (3, 4)]), 0), collate(make_rows([(5, 12), (3, 4)]), 0)
    score(model, fitting, VOCAB)
    with pytest.raises(ModelError, match=r"scales its rotary positions by the longest row of a batch \(dynamic NTK\)"):
        score(model, longer, VOCAB)


def test_a_longer_prompt_than_a_model_has_positions_is_refused_before_generation():
    model = tiny_family("gpt2", n_positions=16)
    with pytest.raises(ModelError, match="GPT2LMHeadModel has 16 positions, and the longest prompt with 10"):
        check_generation(model, plain_model(model))


def test_a_run_says_once_that_rows_pass_the_configured_positions(caplog):
    assert capabilities(tiny_family("llama", max_position_embeddings=16)).positions.configured == 16
    with caplog.at_level(logging.WARNING):
        score(tiny_family("llama", max_position_embeddings=16), collate(make_rows(), 0), VOCAB)
    assert caplog.records == []  # the run compares its longest rows, not each batch

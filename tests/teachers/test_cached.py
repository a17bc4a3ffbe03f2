import json
import logging

import pytest
import torch

from distillkit.chunked.output_head import OutputHead
from distillkit.data.collate import collate
from distillkit.devices.precision import fast_dtype
from distillkit.errors import ModelError
from distillkit.models.fingerprint import fingerprint
from distillkit.storage import scores as score_cache
from distillkit.teachers import cached as module
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Row
from helpers import rank_scores
from helpers.models import save_tiny, tiny_model, tiny_tokenizer
from helpers.runs import on_two_ranks
from helpers.scores import CPU, WIDTH, Counting, Unloadable, in_order, live, loaded, only_folder, ready, some_rows

# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [WIDTH, WIDTH - 7])
def test_scores_are_those_of_the_live_teacher_bit_for_bit(dtype, vocab, source):
    rows = in_order(some_rows())
    batch = collate(rows, pad_id=1)
    expected = live(source, batch, dtype, vocab)
    for number in range(2):  # scored by this teacher, then known from the disk
        teacher = Counting(source, dtype)
        found = ready(teacher, rows, vocab).score(batch)
        assert teacher.loads == (number == 0)
        assert found.hidden.dtype == expected.hidden.dtype == fast_dtype(getattr(torch, dtype), torch.device("cpu"))
        assert torch.equal(found.hidden, expected.hidden)
        assert found.vocab == vocab
        assert torch.equal(found.log_probs(), expected.log_probs())
        part = slice(3, 9)
        assert torch.equal(found.log_probs(part, 2.0), expected.log_probs(part, 2.0))
        assert torch.equal(found.head(found.hidden), expected.head(expected.hidden)), "in the teacher's own type"


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {"logit_scale": 0.25}, {"logit_scale": 0.5}])
def test_the_head_is_kept_with_what_it_does_to_the_logits(config, tmp_path):
    folder = tmp_path / "model"
    model = tiny_model(WIDTH, seed=3, **{"tie_word_embeddings": config.get("tie_word_embeddings", True)})
    head = OutputHead(model.get_output_embeddings(), WIDTH, config.get("logit_scale", 1.0), 30.0)
    model.save_pretrained(folder)

    class Shaped(TransformersTeacher):
        """A teacher with a scale and a soft cap, which a Llama does not have."""

        def setup(self, device):
            super().setup(device)
            self._model.config.logit_scale = config.get("logit_scale")
            self._model.config.final_logit_softcapping = 30.0

    rows = in_order(some_rows(3))
    batch = collate(rows, pad_id=1)
    ready(Shaped(str(folder), "float32"), rows)
    found = ready(Shaped(str(folder), "float32")).score(batch)
    hidden = live(folder, batch).hidden
    assert torch.equal(found.head(found.hidden), head(hidden))
    assert float(found.head(found.hidden).abs().max()) < 30


def test_a_batch_of_any_rows_in_any_order_is_put_together(source):
    rows = some_rows()
    teacher = ready(Counting(source), rows)
    blank = Row(rows[0].input_ids, (False,) * len(rows[0].input_ids), "teacher", "p0")
    for chosen in ([rows[4], rows[1], rows[4]], [blank, rows[2]], [rows[8]]):
        batch = collate(chosen, pad_id=1)
        expected = live(source, batch)
        # Rows were scored in another batch: alike up to rounding.
        torch.testing.assert_close(teacher.score(batch).log_probs(), expected.log_probs(), rtol=1e-4, atol=1e-5)
    assert teacher.score(collate([blank], pad_id=1)).log_probs().shape == (0, WIDTH)
    assert len(teacher.teacher.scored) == 1


# ── what is loaded, and what is written ───────────────────────────────────────────────────────────────────────────────


def test_the_model_leaves_the_memory_after_a_round(source):
    teacher = CachedTeacher(TransformersTeacher(str(source), "float32"))
    teacher.setup(CPU)
    held = teacher.model  # as a generator holds it
    assert held is not None
    teacher.prepare(some_rows())
    assert teacher.teacher.model is None
    assert {parameter.device.type for parameter in held.parameters()} == {"meta"}
    assert teacher.score(collate(some_rows(2), 1)).log_probs().isfinite().all(), "the head stays"
    assert teacher.teacher.model is None


def test_the_model_stays_if_it_is_asked_to(source):
    teacher = ready(Counting(source), some_rows(2), unload=False)
    teacher.prepare(some_rows(4))
    assert teacher.teacher.model is not None
    assert teacher.teacher.loads == 1


def test_a_model_that_is_asked_for_is_loaded_again(source):
    teacher = ready(Counting(source), some_rows(2), vocab=WIDTH - 1)
    assert teacher.teacher.model is None
    again = teacher.model
    assert fingerprint(again) == teacher.fingerprint()
    assert teacher.teacher.vocab_size == teacher.vocab_size == WIDTH - 1
    assert teacher.teacher.loads == 2


def test_the_model_is_not_loaded_where_everything_is_known(source):
    rows = some_rows()
    first = ready(Counting(source), rows)
    again = ready(Unloadable(source), rows, folder=only_folder())
    assert again.vocab_size == WIDTH
    assert again.fingerprint() == first.fingerprint() == fingerprint(loaded(source))
    batch = collate(rows[:3], 1)
    assert torch.equal(again.score(batch).hidden, first.score(batch).hidden)
    with pytest.raises(AssertionError, match="the model was loaded"):
        again.prepare(some_rows(1, seed=5))


def test_a_folder_of_scores_serves_where_the_weights_are_gone(source, tmp_path):
    copy = save_tiny(tmp_path / "model", seed=1)
    rows = some_rows(3)
    first = ready(TransformersTeacher(str(copy), "float32"), rows, folder=str(tmp_path / "scores"))
    (copy / "model.safetensors").unlink()
    teacher = TransformersTeacher(str(copy), "float32")
    assert teacher.identity() is None
    again = ready(teacher, rows, folder=str(tmp_path / "scores"))
    assert torch.equal(again.score(collate(rows, 1)).hidden, first.score(collate(rows, 1)).hidden)
    assert again.tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ModelError, match=r"no weight files to name its cache after\. Set CachedTeacher\.folder"):
        ready(teacher)


def test_each_row_is_scored_once(source, caplog):
    rows = some_rows()
    teacher = ready(Counting(source))
    with caplog.at_level(logging.INFO, "distillkit"):
        teacher.prepare([*rows[:4], *rows[:4]])
        teacher.prepare(rows)
        teacher.prepare(rows)
    assert sorted(teacher.teacher.keys) == sorted(row.key for row in rows)
    lines = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert len(lines) == 2
    positions = sum(sum(row.response_mask) for row in rows[:4])
    assert lines[0].startswith(f"the teacher scored 4 rows, {positions} positions in ")


def test_rows_that_were_not_prepared_are_scored_and_kept(source):
    rows = some_rows()
    teacher = ready(Counting(source), rows[:2])
    batch = collate([rows[0], rows[5], rows[5]], 1)
    found = teacher.score(batch)
    assert len(teacher.teacher.scored) == 2
    assert torch.equal(teacher.score(batch).hidden, found.hidden)
    again = ready(Unloadable(source), folder=only_folder())
    assert torch.equal(again.score(batch).hidden, found.hidden)


def test_rows_are_scored_in_the_teachers_own_type_under_autocast(source):
    batch = collate(in_order(some_rows(3)), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ready(Counting(source)).score(batch)
    assert torch.equal(found.hidden, live(source, batch).hidden)


def test_batches_are_bounded_by_their_tokens(source, monkeypatch):
    monkeypatch.setitem(module.BATCH_TOKENS, "cpu", 40)
    rows = [*some_rows(20), Row(tuple(range(60)), (False,) * 30 + (True,) * 30, "teacher", "long")]
    teacher = ready(Counting(source), rows)
    length = {row.key: len(row.input_ids) for row in rows}
    sizes = [(len(batch), max(length[key] for key in batch)) for batch in teacher.teacher.scored]
    assert all(count * longest <= 40 or count == 1 for count, longest in sizes)
    assert [longest for _, longest in sizes] == sorted(longest for _, longest in sizes)
    assert len(sizes) < 15


@pytest.mark.parametrize("keep", ["hidden", "top_k"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(keep, source, tmp_path, monkeypatch):
    monkeypatch.setattr(score_cache, "SHARD_BYTES", 1)
    monkeypatch.setitem(module.BATCH_TOKENS, "cpu", 40)
    rows, settings = some_rows(20), {"keep": keep, "k": 5}
    whole = ready(Counting(source), rows, folder=str(tmp_path / "whole"), **settings)
    with pytest.raises(KeyboardInterrupt):
        ready(Counting(source, until=4), rows, folder=str(tmp_path / "cut"), **settings)
    rest = ready(Counting(source), rows, folder=str(tmp_path / "cut"), **settings)
    assert rest.teacher.scored == whole.teacher.scored[4:]
    batch = collate(rows, 1)
    for name in ("hidden", "target_logp", "top_k_ids"):
        ours, theirs = getattr(rest.score(batch), name), getattr(whole.score(batch), name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_two_ranks_share_the_work_and_both_read_all_of_it(source, tmp_path):
    folder = tmp_path / "scores"
    on_two_ranks(rank_scores.share, str(source), str(folder))
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert sorted(found[0]["first"] + found[1]["first"]) == sorted(row.key.hex() for row in rank_scores.ROWS)
    assert min(len(rank["first"]) for rank in found) >= 3
    assert [rank["again"] for rank in found] == [[], []]
    alone = ready(Counting(source), rank_scores.ROWS).score(collate(rank_scores.ROWS, 1))
    assert found[0]["sum"] == found[1]["sum"] == pytest.approx(float(alone.hidden.double().sum()), rel=1e-4)

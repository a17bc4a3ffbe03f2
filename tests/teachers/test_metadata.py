from dataclasses import replace

import pytest
import torch
from torch import nn

from distillkit.data.collate import collate
from distillkit.errors import ConfigError, ModelError, StoreError
from distillkit.interfaces import Teacher
from distillkit.models.fingerprint import fingerprint
from distillkit.remote.wheels import cache_dir
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.metadata import read_metadata, write_metadata
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Scores
from helpers.models import save_tiny
from helpers.scores import CPU, WIDTH, Counting, Unloadable, loaded, ready, some_rows


class Nameless(Teacher):
    """A teacher without a model: it says the same of every position."""

    def setup(self, device):
        pass

    def score(self, batch):
        return Scores.from_logits(torch.arange(9.0).expand(batch.num_tokens, 9))

    def tokenizer(self):
        return None

    @property
    def vocab_size(self):
        return 9

    def limit_vocab(self, size):
        pass


def test_a_teacher_without_a_name_needs_a_folder():
    with pytest.raises(ConfigError, match=r"CachedTeacher\.folder is missing\. A Nameless does not name its weights"):
        CachedTeacher(Nameless())


def test_a_teacher_without_a_model_is_kept_by_its_most_likely_tokens(tmp_path):
    rows = some_rows(3, vocab=9)
    teacher = ready(Nameless(), rows, 9, keep="top_k", k=2, folder=str(tmp_path))
    assert teacher.model is None
    assert teacher.fingerprint() is None
    assert teacher.score(collate(rows, 1)).top_k_ids.unique().tolist() == [7, 8]
    with pytest.raises(ModelError, match=r"keep: hidden needs a teacher with a model in this process\. Use top_k"):
        ready(Nameless(), folder=str(tmp_path))


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_1_is_refused(k, source):
    with pytest.raises(ConfigError, match=f"k must be at least 1, got {k}"):
        CachedTeacher(Counting(source), k=k)


def test_k_must_be_below_the_vocabulary(source):
    with pytest.raises(ConfigError, match=rf"k must be below the {WIDTH} tokens of the vocabulary, got {WIDTH}"):
        CachedTeacher(Counting(source), keep="top_k", k=WIDTH).setup(CPU)
    teacher = CachedTeacher(Counting(source), keep="top_k", k=WIDTH - 5)
    teacher.setup(CPU)
    with pytest.raises(ConfigError, match=rf"k must be below the {WIDTH - 5} tokens"):
        teacher.limit_vocab(WIDTH - 5)


def test_another_teachers_folder_is_refused_and_a_copy_of_the_teacher_is_not(source, tmp_path):
    folder, rows = str(tmp_path / "scores"), some_rows(2)
    first = ready(Counting(source), rows, folder=folder)
    same = ready(Counting(save_tiny(tmp_path / "copy", seed=1)), rows, folder=folder)
    assert (same.teacher.scored, same.teacher.loads) == ([], 0), "it has the same name"
    with (tmp_path / "copy" / "config.json").open("a") as file:
        file.write("\n")
    copy = ready(Counting(tmp_path / "copy"), rows, folder=folder)
    assert copy.teacher.scored == []
    assert copy.teacher.loads == 1, "to compare the weights"
    assert read_metadata(tmp_path / "scores").identity == copy.identity()
    ready(Unloadable(tmp_path / "copy"), rows, folder=folder)
    other = save_tiny(tmp_path / "other", seed=2)
    words = rf"holds scores of the teacher {first.fingerprint()}, and this one is {fingerprint(loaded(other))}\. Name"
    with pytest.raises(StoreError, match=words):
        ready(Counting(other), rows, folder=folder)
    with pytest.raises(StoreError, match=r"Name another CachedTeacher\.folder"):
        ready(Counting(source, "bfloat16"), rows, folder=folder)


def test_teachers_that_differ_have_folders_that_differ(source, tmp_path):
    for teacher in (Counting(source), Counting(source, "bfloat16"), TransformersTeacher(str(source), "float32")):
        ready(teacher, some_rows(1))
    assert len(list((cache_dir() / "teachers").iterdir())) == 3


def test_a_head_that_is_no_linear_layer_is_refused(source):
    class Odd(nn.Linear):
        pass

    class OddTeacher(TransformersTeacher):
        def setup(self, device):
            super().setup(device)
            head = self._model.get_output_embeddings()
            odd = Odd(head.in_features, head.out_features, bias=False)
            odd.weight = head.weight
            self._model.set_output_embeddings(odd)

    with pytest.raises(ModelError, match=r"can't store an output embedding of type Odd\. Use keep: top_k"):
        ready(OddTeacher(str(source), "float32"))
    assert ready(OddTeacher(str(source), "float32"), some_rows(2), keep="top_k").fingerprint()


def test_scores_that_are_not_the_models_own_are_refused(source):
    class Sharper(TransformersTeacher):
        def score(self, batch):
            return Scores.from_logits(2 * super().score(batch).log_probs())

    with pytest.raises(ModelError, match=r"needs a teacher whose scores are its model's hidden states"):
        ready(Sharper(str(source), "float32"), some_rows(2))


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_head_is_an_error(damage, source, tmp_path):
    folder = tmp_path / "scores"
    ready(Counting(source), folder=str(folder))
    head = folder / "hidden" / "head.safetensors"
    if damage == "cut":
        head.write_bytes(head.read_bytes()[:-9])
    else:
        write_metadata(folder, replace(read_metadata(folder), fingerprint="0" * 16))
    with pytest.raises(StoreError, match=r"head\.safetensors (can't be read|is not of the teacher) .*remove the teach"):
        ready(Counting(source), folder=str(folder))

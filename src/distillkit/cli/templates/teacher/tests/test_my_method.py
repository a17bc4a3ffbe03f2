from importlib import resources

import pytest
import torch
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.teachers import TransformersTeacher
from distillkit.testing import BigramTeacher, TeacherContract, make_batch
from distillkit.types import Scores

from my_plugin.teacher import MyPlugin


class TestContract(TeacherContract):
    """The contract of teachers, one test per promise: a distribution per position, independent of the batch."""

    def make(self):
        return MyPlugin([BigramTeacher(seed=0), BigramTeacher(seed=1)])


def test_it_is_the_mean_of_the_probabilities():
    batch = make_batch(lengths=(3, 2), writers=("dataset", "dataset"), pairs=(0, 1), vocab=9)
    teachers = [BigramTeacher(seed=0), BigramTeacher(seed=1)]
    averaged = MyPlugin(teachers)
    averaged.setup(torch.device("cpu"))
    expected = torch.stack([teacher.score(batch).log_probs().exp() for teacher in teachers]).mean(0)
    torch.testing.assert_close(averaged.score(batch).log_probs().exp(), expected)


def test_the_vocabulary_is_the_smallest_or_the_limit():
    averaged = MyPlugin([BigramTeacher(seed=0, vocab=400), BigramTeacher(seed=1, vocab=350)])
    averaged.setup(torch.device("cpu"))
    batch = make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9)
    assert averaged.score(batch).log_probs().shape == (3, 350)
    averaged.limit_vocab(340)
    assert averaged.score(batch).log_probs().shape == (3, 340)


def test_teachers_may_have_different_data_types():
    class HalfTeacher(BigramTeacher):
        def score(self, batch):
            head = torch.nn.Linear(8, self.vocab_size, dtype=torch.bfloat16)
            return Scores(super().score(batch).hidden[:, :8].bfloat16(), head, self.vocab_size)

    averaged = MyPlugin([HalfTeacher(), BigramTeacher()])
    averaged.setup(torch.device("cpu"))
    log_probs = averaged.score(make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9)).log_probs()
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))


def test_a_teacher_that_scores_only_its_top_tokens_is_refused():
    class TopTeacher(BigramTeacher):
        def score(self, batch):
            log_probs, top_k_ids = super().score(batch).log_probs().topk(4)
            return Scores.from_top_k(log_probs, top_k_ids[:, :3], log_probs[:, 0])

    averaged = MyPlugin([BigramTeacher(), TopTeacher()])
    averaged.setup(torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="must score the whole vocabulary, but one caches only its most likely tokens"
    ):
        averaged.score(make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9))


def test_the_first_teacher_generates_responses():
    class GeneratingTeacher(BigramTeacher):
        model = torch.nn.Identity()

    assert MyPlugin([GeneratingTeacher(), BigramTeacher()]).model is GeneratingTeacher.model


def test_an_empty_list_of_teachers_is_refused():
    with pytest.raises(ConfigError, match=r"MyPlugin\.teachers needs at least one teacher"):
        MyPlugin([])


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    teacher = config["model"]["teacher"]
    assert registry.get("teacher", teacher["class_path"]) is MyPlugin
    parts = teacher["init_args"]["teachers"]
    assert [registry.get("teacher", part["class_path"]) for part in parts] == [TransformersTeacher] * 2

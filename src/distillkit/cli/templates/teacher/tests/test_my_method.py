from importlib import resources

import pytest
import torch
import yaml
from distillkit import registry
from distillkit.errors import ConfigError
from distillkit.teachers.in_process import TransformersTeacher
from distillkit.testing import BigramTeacher, TeacherContract, make_batch
from distillkit.types import Scores

from my_plugin.teacher import MyPlugin


class TestContract(TeacherContract):
    """A distribution for each position, which a row's neighbours do not change, and so on: one test a promise."""

    def make(self):
        return MyPlugin([BigramTeacher(seed=0), BigramTeacher(seed=1)])


def test_it_is_the_mean_of_the_probabilities():
    batch = make_batch(lengths=(3, 2), writers=("dataset", "dataset"), pairs=(0, 1), vocab=9)
    teachers = [BigramTeacher(seed=0), BigramTeacher(seed=1)]
    together = MyPlugin(teachers)
    together.setup(torch.device("cpu"))
    expected = torch.stack([teacher.score(batch).log_probs().exp() for teacher in teachers]).mean(0)
    torch.testing.assert_close(together.score(batch).log_probs().exp(), expected)


def test_it_is_as_wide_as_the_narrowest_or_as_it_is_told():
    together = MyPlugin([BigramTeacher(seed=0, vocab=400), BigramTeacher(seed=1, vocab=350)])
    together.setup(torch.device("cpu"))
    batch = make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9)
    assert together.score(batch).log_probs().shape == (3, 350)
    together.limit_vocab(340)
    assert together.score(batch).log_probs().shape == (3, 340)


def test_their_weights_may_have_different_types():
    class HalfTeacher(BigramTeacher):
        def score(self, batch):
            head = torch.nn.Linear(8, self.vocab_size, dtype=torch.bfloat16)
            return Scores(super().score(batch).hidden[:, :8].bfloat16(), head, self.vocab_size)

    together = MyPlugin([HalfTeacher(), BigramTeacher()])
    together.setup(torch.device("cpu"))
    found = together.score(make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9)).log_probs()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3))


def test_a_teacher_of_its_top_tokens_alone_is_refused():
    class TopTeacher(BigramTeacher):
        def score(self, batch):
            log_probs, support = super().score(batch).log_probs().topk(4)
            return Scores.from_top_k(log_probs, support[:, :3], log_probs[:, 0])

    together = MyPlugin([BigramTeacher(), TopTeacher()])
    together.setup(torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="must score the whole vocabulary, and one keeps its most likely tokens alone"
    ):
        together.score(make_batch(lengths=(3,), writers=("dataset",), pairs=(0,), vocab=9))


def test_the_first_of_them_writes():
    class WritingTeacher(BigramTeacher):
        model = torch.nn.Identity()

    assert MyPlugin([WritingTeacher(), BigramTeacher()]).model is WritingTeacher.model


def test_no_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"MyPlugin\.teachers needs at least one teacher"):
        MyPlugin([])


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    teacher = config["model"]["teacher"]
    assert registry.get("teacher", teacher["class_path"]) is MyPlugin
    parts = teacher["init_args"]["teachers"]
    assert [registry.get("teacher", part["class_path"]) for part in parts] == [TransformersTeacher] * 2

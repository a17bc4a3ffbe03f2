"""The built-in teachers keep the promises of `distillkit.testing`."""

import pytest

from distillkit import registry
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.testing import BigramTeacher, TeacherContract, check_teacher
from helpers.models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "teacher", seed=1)


def test_these_are_all_built_in_teachers():
    own = {entry.name for entry in registry.entries("teacher") if entry.distribution == "distillkit"}
    assert own == {"CachedTeacher", "TransformersTeacher"}


class TestBigrams(TeacherContract):
    def make(self):
        return BigramTeacher()


class TestTransformers(TeacherContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder):
        self.folder = folder

    def make(self):
        return TransformersTeacher(str(self.folder), "float32")


@pytest.mark.parametrize("settings", [{"keep": "hidden"}, {"keep": "top_k", "k": 16}], ids=["hidden", "top_k"])
def test_a_cached_teacher_keeps_the_contract(folder, tmp_path, settings):
    check_teacher(
        lambda: CachedTeacher(TransformersTeacher(str(folder), "float32"), folder=str(tmp_path / "cache"), **settings)
    )

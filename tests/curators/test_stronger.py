import pytest

from distillkit.curators.base import models_of
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.curators.stronger import StrongerCurator
from distillkit.errors import ConfigError
from distillkit.generators.server import ServerGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.types import Prompt, Prompts, Response, Row, Sampling


class Own(Generator):
    """Has a model of its own, and answers everything with two tokens."""

    needs_models = ()

    def refresh(self, model, tokenizer):
        pass

    def generate(self, prompts, sampling):
        return [Response(prompt.id, (20, 1), "", "stop") for prompt in prompts]


def test_it_brings_its_writer_along_and_says_who_wrote():
    generator = Own()
    curator = StrongerCurator(generator, Sampling(max_new_tokens=2))
    assert curator.own_generators() == {"stronger": generator}
    assert (curator.writers, curator.rounds, curator.needs_reference) == (frozenset({"stronger"}), "once", False)
    rows = curator.curate(Prompts((Prompt("a", (), (5, 6)),)), curator.own_generators())
    assert list(rows) == [Row((5, 6, 20, 1), (False, False, True, True), "stronger", "a")]


def test_a_generator_without_a_model_of_its_own_is_refused():
    with pytest.raises(
        ConfigError, match="must use a model outside the run, and TransformersGenerator generates with the run's"
    ):
        StrongerCurator(TransformersGenerator())


def test_other_rounds_are_refused():
    with pytest.raises(ConfigError, match=r"StrongerCurator\.rounds must be once"):
        StrongerCurator(Own(), rounds="never")


def test_a_curator_needs_the_models_that_its_writers_write_with():
    server = ServerGenerator("http://127.0.0.1:1/v1", "m")
    assert models_of(DatasetCurator()) == models_of(StrongerCurator(server)) == frozenset()
    assert models_of(TeacherCurator()) == models_of(TeacherCurator(generator=TransformersGenerator())) == {"teacher"}
    assert models_of(TeacherCurator(generator=server)) == frozenset()
    assert models_of(PairedCurator()) == {"teacher", "student"}
    assert models_of(PairedCurator(StrongerCurator(server), StudentCurator())) == {"student"}

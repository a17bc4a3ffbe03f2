import pytest

from distillkit.errors import ConfigError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Generator
from distillkit.models.fingerprint import fingerprint
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.stored import Ranks
from distillkit.storage.responses import ResponseStore
from distillkit.types import Prompt, Prompts, Response, Sampling
from helpers.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHORT = Sampling(max_new_tokens=3)
PROMPTS = Prompts((Prompt("a", (), (5, 6)), Prompt("b", (), (7, 8, 9))))


def writers(folder, teacher, **settings):
    generator = TransformersGenerator(progress=False)
    models = {"student": lambda: None, "teacher": teacher}
    return GeneratorPool(generator, ResponseStore(folder), models, TOKENIZER, Ranks(), **settings)


def test_responses_on_disk_need_no_model_where_its_fingerprint_is_known(tmp_path):
    model = tiny_model(len(TOKENIZER))
    written = writers(tmp_path, lambda: model).generators["teacher"].generate(PROMPTS, SHORT)

    def load():
        raise AssertionError("the model was loaded")

    known = writers(tmp_path, load, teacher_fingerprint=lambda: fingerprint(model)).generators["teacher"]
    assert known.generate(PROMPTS, SHORT) == written
    other = writers(tmp_path, load, teacher_fingerprint=lambda: "another").generators["teacher"]
    with pytest.raises(AssertionError, match="the model was loaded"):
        other.generate(PROMPTS, SHORT)


def test_the_fingerprint_of_a_teacher_that_has_none_is_taken_of_its_model(tmp_path):
    model = tiny_model(len(TOKENIZER))
    writers(tmp_path, lambda: model, teacher_fingerprint=lambda: None).generators["teacher"].generate(PROMPTS, SHORT)
    assert [shard["model"] for shard in ResponseStore(tmp_path).shards()] == [fingerprint(model)]


def test_a_writer_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="requests responses of the teacher, but this process has no teacher model"):
        writers(tmp_path, lambda: None).generators["teacher"].generate(PROMPTS, SHORT)


class Pair(Generator):
    """Writes with both models of the run."""

    needs_models = ("student", "teacher")

    def refresh(self, model, tokenizer):
        self.held = dict(model.items())

    def identity(self):
        return "pair:2"

    def generate(self, prompts, sampling):
        return [Response(prompt.id, (1,), "", "stop") for prompt in prompts]


def test_a_generator_of_the_curator_gets_the_models_that_it_names_and_both_are_in_the_provenance(tmp_path):
    student, teacher, pair = tiny_model(len(TOKENIZER)), tiny_model(len(TOKENIZER), seed=2), Pair()
    models = {"student": lambda: student, "teacher": lambda: teacher}
    store = ResponseStore(tmp_path)
    own = GeneratorPool(TransformersGenerator(), store, models, TOKENIZER, Ranks(), curator_generators={"both": pair})
    own.generators["both"].generate(PROMPTS, SHORT)
    assert pair.held == {"student": student, "teacher": teacher}
    named = f"{fingerprint(student)}+{fingerprint(teacher)}+pair:2"
    assert [(shard["writer"], shard["model"]) for shard in store.shards()] == [("both", named)]


def test_a_brought_generator_that_needs_a_model_which_no_run_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="generates with a model of the run, but the run has no stronger"):
        writers(tmp_path, lambda: None, curator_generators={"stronger": TransformersGenerator()})


class Alone(Pair):
    """Writes with a model of its own."""

    needs_models = ()


def test_responses_of_a_generator_without_the_runs_models_are_those_of_one_tokenizer(tmp_path):
    named = []
    for tokenizer in (TOKENIZER, tiny_tokenizer(), tiny_tokenizer(330)):
        store = ResponseStore(tmp_path / str(len(named)))
        models = {"student": lambda: None}
        own = GeneratorPool(
            TransformersGenerator(), store, models, tokenizer, Ranks(), curator_generators={"both": Alone()}
        )
        own.generators["both"].generate(PROMPTS, SHORT)
        named += [shard["model"] for shard in store.shards()]
    assert named[0] == named[1] != named[2]
    assert all(name.startswith("tokenizer:") and name.endswith("+pair:2") for name in named)

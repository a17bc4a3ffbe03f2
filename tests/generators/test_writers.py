import pytest

from distillkit.errors import ConfigError
from distillkit.generators.in_process import TransformersGenerator
from distillkit.generators.stored import Ranks
from distillkit.generators.writers import Writers
from distillkit.models.fingerprint import fingerprint
from distillkit.store import ResponseStore
from distillkit.types import Prompt, Prompts, Sampling
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHORT = Sampling(max_new_tokens=3)
PROMPTS = Prompts((Prompt("a", (), (5, 6)), Prompt("b", (), (7, 8, 9))))


def writers(folder, teacher, **settings):
    generator = TransformersGenerator(progress=False)
    models = {"student": lambda: None, "teacher": teacher}
    return Writers(generator, ResponseStore(folder), models, TOKENIZER, Ranks(), **settings)


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
    with pytest.raises(ConfigError, match="asks the teacher to write, and there is no teacher model in this process"):
        writers(tmp_path, lambda: None).generators["teacher"].generate(PROMPTS, SHORT)

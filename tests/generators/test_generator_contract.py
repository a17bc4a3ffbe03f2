"""The built-in generators that need neither a server nor vLLM keep the promises of `distillkit.testing`."""

import json

import pytest

from distillkit import registry
from distillkit.generators.file import FileGenerator
from distillkit.generators.local import LocalGenerator
from distillkit.generators.speculative.generator import SpeculativeGenerator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.testing import GeneratorContract, check_generator
from helpers.models import save_tiny


def test_these_are_the_generators_that_need_nothing_else():
    own = {entry.name for entry in registry.entries("generator") if entry.distribution == "distillkit"}
    tested = {kind.__name__ for kind in (FileGenerator, TransformersGenerator, LocalGenerator, SpeculativeGenerator)}
    assert own - tested == {"ServerGenerator", "VLLMGenerator"}


class TestTransformers(GeneratorContract):
    def make(self):
        return TransformersGenerator(batch_size=3, progress=False)


@pytest.mark.parametrize("settings", [{}, {"rule": "top_k"}], ids=["exact", "top_k"])
def test_a_speculative_generator_keeps_the_contract(settings):
    check_generator(lambda: SpeculativeGenerator(progress=False, **settings))


def test_a_local_generator_keeps_the_contract(tmp_path):
    folder = save_tiny(tmp_path / "model", seed=4)
    check_generator(lambda: LocalGenerator(str(folder), dtype="float32", progress=False))


def test_a_file_of_responses_keeps_the_contract(tmp_path):
    questions = [prompt.messages[0]["content"] for prompt in GeneratorContract().prompts()]
    path = tmp_path / "responses.jsonl"
    lines = [
        json.dumps({"prompt": question, "response": "Yes. " * (place + 1)}) for place, question in enumerate(questions)
    ]
    path.write_text("\n".join(lines))
    check_generator(lambda: FileGenerator(str(path)))

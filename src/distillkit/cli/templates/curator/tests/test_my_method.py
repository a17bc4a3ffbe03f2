from importlib import resources

import pytest
import yaml
from distillkit import Sampling, registry
from distillkit.testing import CuratorContract, SeededGenerator, make_prompts

from my_plugin.curator import MyPlugin


class TestContract(CuratorContract):
    """The contract of curators, one test per promise: equally many rows per prompt, repeatable results, and so on."""

    def make(self):
        return MyPlugin()


@pytest.mark.parametrize(("round_index", "writer"), [(0, "teacher"), (1, "student"), (2, "teacher")])
def test_teacher_and_student_alternate(round_index, writer):
    prompts = make_prompts(3).at_round(round_index)
    rows = MyPlugin().curate(prompts, {name: SeededGenerator(name) for name in ("teacher", "student")})
    responses = SeededGenerator(writer).generate(prompts, Sampling())
    assert [row.writer for row in rows] == [writer] * 3
    assert [row.input_ids for row in rows] == [
        prompt.input_ids + response.token_ids for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert [sum(row.response_mask) for row in rows] == [len(response.token_ids) for response in responses]


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    curator = config["model"]["curator"]
    assert registry.get("curator", curator["class_path"]) is MyPlugin
    assert MyPlugin(Sampling(**curator["init_args"]["sampling"])).sampling.max_new_tokens == 256

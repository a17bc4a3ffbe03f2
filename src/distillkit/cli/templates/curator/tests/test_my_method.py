from importlib import resources

import pytest
import yaml
from distillkit import Sampling, registry
from distillkit.testing import CuratorContract, SeededGenerator, make_prompts

from my_plugin.curator import MyPlugin


class TestContract(CuratorContract):
    """As many rows for each prompt as for every other, the same when asked again, and so on: one test a promise."""

    def make(self):
        return MyPlugin()


@pytest.mark.parametrize(("number", "writer"), [(0, "teacher"), (1, "student"), (2, "teacher")])
def test_teacher_and_student_write_in_turn(number, writer):
    prompts = make_prompts(3).at_round(number)
    rows = MyPlugin().curate(prompts, {name: SeededGenerator(name) for name in ("teacher", "student")})
    written = SeededGenerator(writer).generate(prompts, Sampling())
    assert [row.writer for row in rows] == [writer] * 3
    assert [row.input_ids for row in rows] == [
        prompt.input_ids + response.token_ids for prompt, response in zip(prompts, written, strict=True)
    ]
    assert [sum(row.response_mask) for row in rows] == [len(response.token_ids) for response in written]


def test_the_configuration_names_the_installed_part():
    file = resources.files("my_plugin") / "my_method.yaml"
    config = yaml.safe_load(file.read_text())
    curator = config["model"]["curator"]
    assert registry.get("curator", curator["class_path"]) is MyPlugin
    assert MyPlugin(Sampling(**curator["init_args"]["sampling"])).sampling.max_new_tokens == 256

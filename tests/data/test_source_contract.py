"""The built-in sources keep the contract of sources."""

import json

import pytest

from distillkit.data.reasoning_gym import ReasoningGym
from distillkit.data.records import Source
from distillkit.testing import check_source


def test_a_file_keeps_the_contract(tmp_path):
    rows = [{"prompt": "Hello."}, {"prompt": "Hello!", "response": "Good day."}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_source(Source(str(tmp_path / "prompts.jsonl")))


@pytest.mark.reasoning_gym
def test_reasoning_gym_keeps_the_contract():
    check_source(ReasoningGym("basic_arithmetic", size=5))

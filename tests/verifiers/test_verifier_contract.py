"""Every installed verifier keeps the promises of `distillkit.testing`."""

import pytest

from distillkit import registry
from distillkit.testing import check_verifier

ELSEWHERE = {
    "PairwiseJudge",
    "PythonTests",
    "ReasoningGymAnswer",
}  # in test_judge.py, test_code.py, test_reasoning_gym.py
INSTALLED = registry.available("verifier")


def test_all_built_in_verifiers_are_installed():
    assert {"Distinct", "MeanLogProb", "NumericAnswer", "TargetLength"} <= set(INSTALLED)


@pytest.mark.parametrize("name", sorted({*INSTALLED} - ELSEWHERE))
def test_every_installed_verifier_keeps_the_contract(name):
    check_verifier(registry.get("verifier", name)())

"""What every test shares."""

import importlib.util
import os

import pytest
import torch

# Lightning 2.6 calls what jsonargparse 4.49 deprecates; which of the warnings comes first depends on the tests' order.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU or vLLM are skipped, and said to be, where there is none."""
    missing = {
        "gpu": (not torch.cuda.is_available(), "needs a GPU"),
        "vllm": (importlib.util.find_spec("vllm") is None, "needs vLLM: tox -e vllm"),
    }
    for item in items:
        for name, (absent, reason) in missing.items():
            if absent and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))

"""What every test shares."""

import os

import pytest
import torch

# Lightning 2.6 calls what jsonargparse 4.49 deprecates; which of the warnings comes first depends on the tests' order.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, and said to be, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

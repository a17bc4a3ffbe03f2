"""What every test shares."""

import importlib.util
import logging
import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command takes the log for itself; the next test looks for its lines where pytest has them."""
    log = logging.getLogger("distillkit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = before

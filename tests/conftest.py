"""What every test shares."""

import logging
import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command takes the log for itself; the next test looks for its lines where pytest has them."""
    log = logging.getLogger("distillkit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = before

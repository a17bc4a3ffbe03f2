"""The order of vLLM's tests."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: once the n-gram drafts of the engine's tests have imported numba, no engine can start."""
    items.sort(key=lambda item: item.path != Path(__file__).with_name("test_runs.py"))

"""A tiny teacher on disk, and a cache of the test's own."""

import pytest

from helpers.models import save_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=1)

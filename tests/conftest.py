"""What every test shares."""

import importlib.util
import logging
import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Lightning 2.6 calls what jsonargparse 4.49 deprecates; which of the warnings comes first depends on the tests' order.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; runs of tests would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _lacks(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU or a package of an extra are skipped, and said to be, where there is none."""
    missing = {
        "gpu": (not torch.cuda.is_available(), "needs a GPU"),
        "vllm": (_lacks("vllm"), "needs vLLM: tox -e vllm"),
        "lm_eval": (_lacks("lm_eval"), "needs lm-eval: tox -e conformance"),
        "reasoning_gym": (_lacks("reasoning_gym"), "needs reasoning-gym: tox -e conformance"),
        "conformance": (_lacks("trl", "liger_kernel"), "needs trl and liger-kernel: tox -e conformance"),
    }
    on_the_cpu = os.environ.get("DISTILLKIT_GPU_TESTS_ON") == "cpu"  # tests/gpu/conftest.py
    for item in items:
        for name, (absent, reason) in missing.items():
            if name == "gpu" and on_the_cpu and item.path.parent.name == "gpu":
                continue
            if absent and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command leaves its seed in the environment, where the next test's parts would take theirs from."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is restored, whoever sets it
    monkeypatch.delenv("PL_GLOBAL_SEED")


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command takes the log for itself; the next test looks for its lines where pytest has them."""
    log = logging.getLogger("distillkit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = before

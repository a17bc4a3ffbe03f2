"""Other people's libraries, imported when a test asks for them: they are not among the packages that all tests need."""

import os
import warnings

import pytest


@pytest.fixture(scope="session")
def gkd():
    """`trl.experimental.gkd`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings(action="ignore"):
        import trl.experimental.gkd

        return trl.experimental.gkd


@pytest.fixture(scope="session")
def chunked(gkd):
    """The per-token divergence of trl's DistillationTrainer, from hidden states and heads."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply


@pytest.fixture(scope="session")
def liger():
    """`liger_kernel.chunked_loss`."""
    with warnings.catch_warnings(action="ignore"):
        import liger_kernel.chunked_loss

        return liger_kernel.chunked_loss

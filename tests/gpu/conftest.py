"""Tests of what only a GPU runs: streams, pinned memory, flex attention, CUDA graphs, its random state and its memory.

    pytest tests/gpu                                 on the first GPU; skipped where there is none
    DISTILLKIT_GPU_TESTS_ON=cpu pytest tests/gpu     the same test bodies on the CPU, to see that the tests are whole

distillkit need not be installed: `PYTHONPATH=src` is enough, no test asks for an entry point.
"""

import os

# Read when CUDA and inductor start. With a fixed workspace cuBLAS gives the same product on every stream; kernels that
# are compiled in this process need no pool of workers, whose start takes longer than these kernels.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillkit.models import packing
from gpu.small import ON_CPU, save_models

HARMLESS = (
    # They speak of speed, or of rounding that a test allows for.
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication available:UserWarning",
    "ignore:\\s*Online softmax is disabled:UserWarning",
    "ignore:.*does not have a deterministic implementation:UserWarning",
    "ignore:.*defaults to a non-deterministic algorithm:UserWarning",
    # A thread that runs backward, or writes a round, has no context of its own before its first product.
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning",
    "ignore:The AccumulateGrad node's stream does not match:UserWarning",
    # Dynamo looks at it itself.
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
    # Of a run on the CPU that a run on the device is compared with.
    "ignore:GPU available but not used:UserWarning",
    # With float16 the first steps are skipped until the loss is scaled well.
    "ignore:Detected call of `lr_scheduler.step:UserWarning",
    # Of torch's and triton's own files, whatever they deprecate in one another.
    "ignore::DeprecationWarning:torch.*",
    "ignore::DeprecationWarning:triton.*",
    "ignore::FutureWarning:torch.*",
    "ignore::UserWarning:torch._inductor.*",
    "ignore::UserWarning:torch._dynamo.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for line in HARMLESS:
                item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where models and batches go."""
    return torch.device("cpu") if ON_CPU else torch.device("cuda", 0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A teacher and a student as folders."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test sees kernels, settings or memory of another; what is compiled again comes from inductor's cache."""
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision(precision)
    if not ON_CPU:
        torch._dynamo.reset()
        packing._compiled.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that sum in one order, where there are any; the fixture above takes the setting back."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with sdpa_kernel(SDPBackend.MATH):  # the backward pass of the others adds in any order where it only warns of it
        yield

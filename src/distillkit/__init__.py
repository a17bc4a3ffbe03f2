"""distillkit: distillation of large language models on Lightning.

The public names are imported when they are first used, so that `import distillkit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.data.module import DistillData as DistillData
    from distillkit.losses.token import TokenLoss as TokenLoss
    from distillkit.models.student import Lora as Lora
    from distillkit.models.student import Student as Student
    from distillkit.module import DistillModule as DistillModule
    from distillkit.types import Sampling as Sampling

__version__ = "0.1.0"

_HOMES = {
    "DistillData": "distillkit.data.module",
    "DistillModule": "distillkit.module",
    "Lora": "distillkit.models.student",
    "Sampling": "distillkit.types",
    "Student": "distillkit.models.student",
    "TokenLoss": "distillkit.losses.token",
}

__all__ = ["DistillData", "DistillModule", "Lora", "Sampling", "Student", "TokenLoss", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

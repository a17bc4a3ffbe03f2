from .datamodule import DistillData as DistillData
from .module import DistillModule as DistillModule

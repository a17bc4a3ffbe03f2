from .datamodule import DistillData as DistillData
from .encoded import encode_split as encode_split
from .module import DistillModule as DistillModule

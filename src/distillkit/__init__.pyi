from .losses import TokenLoss as TokenLoss
from .models import Lora as Lora
from .models import Student as Student
from .training import DistillData as DistillData
from .training import DistillModule as DistillModule
from .types import Sampling as Sampling

__version__: str

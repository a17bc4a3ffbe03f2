from .code import PythonTests as PythonTests
from .distinct import Distinct as Distinct
from .judge import PairwiseJudge as PairwiseJudge
from .length import TargetLength as TargetLength
from .likelihood import MeanLogProb as MeanLogProb
from .numeric import NumericAnswer as NumericAnswer
from .reasoning_gym import ReasoningGymAnswer as ReasoningGymAnswer

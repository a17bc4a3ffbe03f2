from .adaptive import AdaptiveAlpha as AdaptiveAlpha
from .fixed import Constant as Constant
from .fixed import Cosine as Cosine
from .fixed import Linear as Linear
from .fixed import Piecewise as Piecewise

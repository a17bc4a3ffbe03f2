from .side_by_side import Comparison as Comparison
from .side_by_side import compare as compare

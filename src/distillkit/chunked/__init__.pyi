from .evaluate import PositionLoss as PositionLoss
from .evaluate import chunked_sum as chunked_sum
from .evaluate import slices as slices
from .likelihood import row_means as row_means
from .likelihood import target_log_probs as target_log_probs
from .memory import default_budget as default_budget
from .output_head import OutputHead as OutputHead

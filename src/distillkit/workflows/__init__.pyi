from .curation import CurationResult as CurationResult
from .curation import curate as curate
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .student_export import export as export

from .cached import CachedTeacher as CachedTeacher
from .transformers import TransformersTeacher as TransformersTeacher

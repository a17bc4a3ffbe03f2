from .merge import merge as merge
from .responses import Provenance as Provenance
from .responses import ResponseStore as ResponseStore
from .verify import verify as verify

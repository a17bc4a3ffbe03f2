"""`python -m distillkit`: the command."""

import ctypes
import os
import signal
import sys

from distillkit.cli.main import main
from distillkit.devices.stopping import PARENT


def end_with(parent: int) -> None:
    """Has this process killed when `parent` ends (on Linux).

    A killed comparison leaves no run behind, which the next one would meet in the same folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before that
            sys.exit(1)


if __name__ == "__main__":
    parent = os.environ.pop(PARENT, None)  # processes of this one have it as their parent
    if parent is not None:
        end_with(int(parent))
    sys.exit(main())

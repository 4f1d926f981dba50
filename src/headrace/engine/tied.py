"""`headrace` tied to its starter: `python -m headrace.engine.tied PARENT serve ...`.

The command line as usual, but the process is asked to end (SIGTERM) when the process PARENT does.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signum: signal.Signals) -> None:
    """Let the kernel send `signum` when the thread that made this process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    sys.argv = ["headrace", *sys.argv[2:]]
    runpy.run_module("headrace", run_name="__main__")

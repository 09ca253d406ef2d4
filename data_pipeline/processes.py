"""Processes that nobody would watch once their parent is gone.

Invariant: a process that called `end_with_parent` does not outlive the process that started it, even where that was killed.
"""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Asks the kernel to kill this process when its parent is gone. Elsewhere than on Linux nothing does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def begin_worker(number: int) -> None:
    """For torch's DataLoader: a worker whose trainer was killed would wait for ever to hand over what it has read."""
    end_with_parent()

"""What a process that works for long asks of the system: to end with its parent, to keep its memory, to have many files open.

Invariant: a process that called `end_with_parent` or `end_with_maker` does not outlive the process that started it, even where that was
killed.
"""

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading


def end_with_parent() -> None:
    """Asks the kernel to kill this process when its parent is gone. Elsewhere than on Linux nothing does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def end_with_maker() -> None:
    """Ends this process, a worker of `multiprocessing`, when the process that made it is gone, also where that was killed.

    The kernel does so where that one forked it. It may watch another one: a server, which lives as long as any of its workers does.
    """
    maker = multiprocessing.parent_process()
    if maker is None:
        return
    if maker.pid == os.getppid():
        end_with_parent()  # even where this process is stuck in C

    def wait() -> None:
        maker.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def keep_freed_memory() -> None:
    """Makes the C library keep what this process frees, where it can (glibc): for work that takes and frees the same megabytes for ever.

    Given back to the kernel, they come back as page faults: 5,000 in a step of the demo on a CPU, an eighth of its time.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        never, trim_threshold, mmap_max = 2**31 - 1, -1, -4
        libc.mallopt(trim_threshold, never)
        libc.mallopt(mmap_max, 0)


def open_many_files() -> None:
    """Raises the limit of open files from the usual 1,024 to what the system allows: a rank has two connections to every other one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def begin_in_pool() -> None:
    """For a pool's worker: Ctrl-C, which reaches it too, ends it without a traceback; the command says it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_maker()


def begin_worker(number: int) -> None:
    """For torch's DataLoader: a worker whose trainer was killed would wait for ever to hand over what it has read."""
    end_with_maker()
    keep_freed_memory()
    gc.freeze()  # what the trainer has imported is no garbage: to look through it again and again costs a worker a hundredth of its time

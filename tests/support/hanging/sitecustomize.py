"""Makes Python processes hang on a signal, wherever they are: on SIGALRM asleep, on SIGVTALRM in C with the interpreter held.

Python imports it at the start of every process that has this folder on its path.
"""

import ctypes
import signal
import time


def sleep_for_ever(*_: object) -> None:
    time.sleep(1e6)


def hold_the_interpreter(*_: object) -> None:
    ctypes.PyDLL(None).sleep(1_000_000)


signal.signal(signal.SIGALRM, sleep_for_ever)
signal.signal(signal.SIGVTALRM, hold_the_interpreter)

"""Makes the clock of Python processes jump on SIGALRM, by a week: the launcher's ahead, a rank's back.

Python imports it at the start of every process that has this folder on its path.
"""

import signal
import sys
import time

real, WEEK = time.time, 7 * 24 * 3600


def jump(*_: object) -> None:
    by = -WEEK if sys.argv[0].endswith("rank.py") else WEEK
    time.time = lambda: real() + by


signal.signal(signal.SIGALRM, jump)

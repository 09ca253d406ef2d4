"""Holds the tasks of a Slurm array at their start until the file that HELD_UNTIL names is there.

Python imports it at the start of every process that has this folder on its path.
"""

import os
import time
from pathlib import Path

while "SLURM_ARRAY_TASK_ID" in os.environ and not Path(os.environ["HELD_UNTIL"]).exists():
    time.sleep(0.05)

"""A run that is killed a hundred times, at random moments, ends bitwise as the one that was never interrupted.

`KILLS=10` makes it shorter, `SEED` moves the kills. tests/train/lives/test_resume.py has the form of `make test`.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE

KILLS, SEED = int(os.environ.get("KILLS", "100")), int(os.environ.get("SEED", "0"))
JITTER_S = 0.25
"""Several steps of the model: a kill falls into forward, backward, a collective, or the writing of a checkpoint."""


@pytest.mark.soak
def test_kills_at_random_moments_leave_the_uninterrupted_run_bitwise(stage, demo):
    """Of a rank, of both, or of the launcher; while starting, training, saving; with other workers and another cadence each time."""
    chance, victims = random.Random(SEED), Counter()
    small = {"train": {"steps": 3 * KILLS + 12}, "data": {"sources": {"pairs": {"path": str(demo.source("pairs"))}}}}
    whole, broken = stage("whole", **small, checkpoint={"every": 10**6}), stage("broken", **small)
    assert whole.train().returncode == EXIT_DONE
    for _ in range(KILLS):
        process = broken.start(f"checkpoint.every={chance.choice((1, 1, 2, 3))}", f"data.workers={chance.choice((0, 0, 1, 2))}")
        steps, victim = chance.randint(0, 5), chance.choice(("rank 0", "rank 1", "both ranks", "launcher"))
        begun, before = broken.run.life(), max(broken.losses(), default=0)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            # Within a life, steps count from where it resumed, which is at most `before`.
            own = [line for line in jsonl.read(broken.run.metrics) if line["life"] > begun]
            if broken.run.life() > begun and (len(own) >= steps or max((line["step"] for line in own), default=0) > before + steps):
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, JITTER_S))
        ranks = broken.rank_pids()
        if process.poll() is not None or len(ranks) < 2:  # it got to its end
            process.communicate()
            break
        for pid in {"rank 0": ranks[:1], "rank 1": ranks[1:2], "both ranks": ranks[:2], "launcher": [process.pid]}[victim]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=400)
        assert process.returncode in (EXIT_CRASH, -signal.SIGKILL, EXIT_DONE)
        victims[victim] += 1
        while broken.rank_pids():
            time.sleep(0.01)
        if broken.run.final.exists():
            break
    assert broken.train().returncode == EXIT_DONE
    resumed = broken.resumed_from()
    print(f"{sum(victims.values())} kills {dict(victims)}, {len(resumed)} lives, {sum(r is None for r in resumed)} of them from the start")
    assert broken.losses() == whole.losses()
    assert broken.weights() == whole.weights()
    assert sum(victims.values()) >= KILLS // 2
    shutil.rmtree(broken.run.path)

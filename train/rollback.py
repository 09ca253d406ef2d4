"""Going back after too many skipped steps in a row: the weights of the last good checkpoint, the data and the schedule of now.

Invariant: a rollback is a checkpoint. It has the weights, the optimizer and the random state of the last good one, and the step, the
cursor and the counters of the moment at which the guard gave up; it appears by one rename, and the next life resumes from it as from any
other. So a kill leaves either none, and the replayed steps come to it again, or a whole one; and a step number still means one place in
the data. A checkpoint that is itself a rollback is never gone back to: a second one to the same weights would be the third try.

    RUN/skipped/rollbacks.jsonl   a line a rollback: from which step to which, and the data between, which is skipped for good
"""

import os
import shutil
import time
from dataclasses import replace

from data_pipeline import jsonl
from train import checkpoint, intact
from train.checkpoint import TrainState
from train.config import CheckpointConfig
from train.ranks import Ranks
from train.run_dir import RunDir

WENT_BACK_TO = "went_back_to"
"""Key of a rollback in its `TrainState.guard`: the step whose weights it has."""


def roll_back(run: RunDir, ranks: Ranks, now: TrainState, config: CheckpointConfig) -> int | str:
    """Makes the rollback of the state `now`; all ranks call it, while no checkpoint is being written.

    Returns the step whose weights it has, or why there is none.

    Raises:
        TryAgainError: a checkpoint cannot be read, on rank 0.
    """
    return ranks.share(_roll_back(run, now, config) if ranks.rank == 0 else None)


def _roll_back(run: RunDir, now: TrainState, config: CheckpointConfig) -> int | str:
    folder = intact.newest_good(run)
    if folder is None:
        return "there is no good checkpoint to go back to"
    good = checkpoint.read_state(folder)
    if WENT_BACK_TO in good.guard:
        return f"the run went back to step {good.guard[WENT_BACK_TO]} already, and no checkpoint after that is good"
    line = {"step": now.step, "to": good.step, "time": time.time(), "first_skipped": good.cursor, "next": now.cursor}
    (run.path / "skipped").mkdir(exist_ok=True)
    jsonl.append(run.path / "skipped" / "rollbacks.jsonl", [line])
    state = replace(
        now,
        totals={**now.totals, "step_ms": good.totals.get("step_ms", 0)},  # the time since then made nothing that is kept
        guard={**good.guard, WENT_BACK_TO: good.step},
        world=good.world,
        zero_stage=good.zero_stage,
        dtype=good.dtype,
    )
    name = f"{intact.PREFIX}{now.step:08d}"
    partial = run.checkpoints / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, copy_function=_link, ignore=shutil.ignore_patterns("state.json", "manifest.json"))
    checkpoint.publish(run, partial, name, state, config, written={})
    return good.step


def _link(source: str, target: str) -> None:
    """The same bytes under another name; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

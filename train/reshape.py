"""A checkpoint of another number of ranks, made fit for these, through DeepSpeed's universal checkpoint where it needs to be.

Invariant: the checkpoint itself is not touched; the copy is for one loading, and the next life sweeps it away.
"""

import os
import subprocess
import sys
from pathlib import Path

from data_pipeline.errors import UserError
from train.ranks import Ranks
from train.run_dir import RunDir

STAGES = (1, 2)
"""ZeRO stages whose converted checkpoints train on as before, each also under the other.

Of ZeRO-3 the second step differed by 0.02 nats.
"""


def goes_on(stage: int, dtype: str, now_stage: int, same_world: bool) -> bool:
    """Whether a checkpoint of a ZeRO stage and number format can be gone on with under another stage, or on other ranks."""
    if stage != now_stage and not {stage, now_stage} <= set(STAGES):
        return False
    return same_world or stage in STAGES or is_whole(stage, dtype)


def is_whole(stage: int, dtype: str) -> bool:
    """Whether every rank holds all of the optimizer: such a checkpoint fits any number of ranks as it is."""
    return stage == 0 and dtype == "torch.float32"


def converted(folder: Path, run: RunDir, ranks: Ranks) -> Path:
    """A universal copy of a checkpoint: rank 0 makes it, all wait. The engine loads it with `universal`.

    Raises:
        UserError: DeepSpeed could not convert it.
    """
    target = run.checkpoints / f".{folder.name}-universal.partial"
    problem = ranks.share(_convert(folder, target) if ranks.rank == 0 else None)
    if problem:
        raise UserError(f"{folder} is of another number of ranks and could not be converted: {problem} (use the same --procs)")
    return target


def _convert(folder: Path, target: Path) -> str | None:
    workers = str(min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder), "--output_folder", str(target)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    print(done.stdout, flush=True)
    return (done.stdout.strip().splitlines() or ["it said nothing"])[-1] if done.returncode else None

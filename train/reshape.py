"""A checkpoint of another number of ranks, made fit for these, through DeepSpeed's universal checkpoint where it needs to be.

Invariant: the checkpoint itself is not touched; the copy is for one loading, and the next life sweeps it away.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import UserError
from train.ranks import Ranks
from train.run_dir import RunDir

POLL_S = 0.2
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


def converted(folder: Path, run: RunDir, ranks: Ranks, alive: Callable[[], None]) -> Path:
    """A universal copy of a checkpoint: rank 0 makes it, all wait. The engine loads it with `universal`.

    `alive` is called on all ranks as often as the copy has grown: one of a large model takes longer than a silence may last.

    Raises:
        UserError: DeepSpeed could not convert it.
    """
    target = run.checkpoints / f".{folder.name}-universal.partial"
    size = 0
    with tempfile.TemporaryFile("w+") as said:
        process = _start(folder, target, said) if ranks.rank == 0 else None
        while True:
            time.sleep(POLL_S)
            running, grown = ranks.share((process.poll() is None, _bytes(target)) if process else None)
            if not running:
                break
            if grown != size:
                size = grown
                alive()
        problem = ranks.share(_problem(process.returncode, said) if process else None)
    if problem:
        raise UserError(f"{folder} is of another number of ranks and could not be converted: {problem} (use the same --procs)")
    return target


def _start(folder: Path, target: Path, said: TextIO) -> subprocess.Popen[str]:
    workers = str(min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder), "--output_folder", str(target)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment)


def _problem(code: int, said: TextIO) -> str | None:
    said.seek(0)
    words = said.read()
    print(words, flush=True)
    return (words.strip().splitlines() or ["it said nothing"])[-1] if code else None


def _bytes(folder: Path) -> int:
    """Of the files that are there now; files and folders come and go meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):  # which passes over a folder that has gone
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size

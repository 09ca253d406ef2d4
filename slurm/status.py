"""`xc-slurm status`, `stop` and `logs`: a run seen and ended from a login node.

Invariant: everything is read from the queue and from the run directory; nothing asks the job, which may be frozen.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE, TryAgainError, UserError
from slurm import client
from slurm.client import Job
from slurm.job_dir import JobDir, newest_checkpoint
from train.run_dir import read_json

Answer = TypeVar("Answer")

TAIL_BYTES = 1 << 18
WATCH_S = 5.0
STOP_WAIT_S = 600.0


def status(run_dir: str | None, watch: bool) -> int:
    """Prints one run, or a line for each of the user's jobs; again and again with `watch`, until there is nothing left to see.

    Raises:
        UserError: the directory is no run.
        TryAgainError: Slurm does not answer.
    """
    show: Callable[[], tuple[str, bool]] = _all_runs if run_dir is None else partial(describe, JobDir.existing(run_dir))
    text, alive = show()
    print(text, flush=True)
    while watch and alive:
        time.sleep(WATCH_S)
        text, alive = _patiently(show)
        print(("\033[H\033[J" if sys.stdout.isatty() else "\n") + text, flush=True)
    return EXIT_DONE


def describe(job_dir: JobDir) -> tuple[str, bool]:
    """What there is to know of a run, in lines; and whether its job has not ended."""
    run = job_dir.run
    job_id = job_dir.job_id()
    job = client.find(job_id) if job_id else None
    lines = [("run", str(job_dir.path)), ("job", _job_line(job_id, job, job_dir))]
    if job and not job.ended and job.reason:
        lines.append(("waits", job.waits))
    recent = tail_metrics(run.metrics)
    if recent:
        lines.append(("step", _step_line(recent)))
    beat = read_json(run.heartbeat)
    if beat and job and not job.ended:
        lines.append(("alive", f"{_ago(beat['time'])}: {beat['phase']}, step {beat['step']}"))
    step = newest_checkpoint(run)
    if step:
        age = (run.checkpoints / f"step-{step:08d}" / "manifest.json").stat().st_mtime
        lines.append(("checkpoint", f"step {step}, {_ago(age)}"))
    outcome = run.read_outcome()
    if outcome:
        lines.append(("last end", f"exit code {outcome['code']}, step {outcome['step']}: {outcome['reason']}"))
    return "\n".join(f"{name:<11}{text}" for name, text in lines), job is not None and not job.ended


def stop(run_dir: str) -> int:
    """Asks a run to checkpoint and end; a job that only waits is taken out of the queue.

    Raises:
        UserError: it has no job that could end.
        TryAgainError: Slurm does not answer.
    """
    job_dir = JobDir.existing(run_dir)
    job_id = job_dir.job_id()
    job = client.find(job_id) if job_id else None
    if job is None or job.ended:
        raise UserError(f"{run_dir} has no job in the queue{f': {job.id} is {job.state}' if job else ''} (there is nothing to stop)")
    job_dir.run.stop_file.touch()
    if job.state == "PENDING":
        client.run("scancel", "--state=PENDING", job.id)
    else:
        print(f"job {job.id} ends after this step, with a checkpoint ...", flush=True)
    deadline = time.monotonic() + STOP_WAIT_S
    while (now := _patiently(partial(client.find, job.id))) and not now.ended:
        if time.monotonic() > deadline:
            print(f"job {job.id} is still {now.state}; scancel {job.id} ends it without another checkpoint", file=sys.stderr)
            return EXIT_DONE
        time.sleep(0.5)
    print(f"job {job.id} ended at step {newest_checkpoint(job_dir.run)}; the same xc-slurm submit goes on")
    return EXIT_DONE


def logs(run_dir: str, rank: int | None, follow: bool) -> int:
    """Prints what the job said, or one of its ranks, over all lives; goes on as it is written with `follow`.

    Raises:
        UserError: there is no such log.
    """
    job_dir = JobDir.existing(run_dir)
    file = job_dir.log if rank is None else job_dir.run.logs / f"rank-{rank}.log"
    if not file.exists():
        ranks = sorted(int(p.stem[5:]) for p in job_dir.run.logs.glob("rank-*.log"))
        have = f"ranks {ranks[0]} to {ranks[-1]} have one" if ranks else "no rank has started yet"
        raise UserError(f"no {file.name} in {job_dir.run.logs} ({have})")
    sys.stdout.flush()
    return subprocess.run(["tail", "--lines=+1", *(["--follow=name", "--retry"] if follow else []), "--", str(file)]).returncode


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """The answer of a Slurm that may be away for some minutes: that is no end of a job.

    Raises:
        TryAgainError: it was away for `STOP_WAIT_S`.
    """
    deadline = time.monotonic() + STOP_WAIT_S
    while True:
        try:
            return ask()
        except TryAgainError:
            if time.monotonic() > deadline:
                raise
        time.sleep(WATCH_S)


def tail_metrics(file: Path) -> list[dict[str, Any]]:
    """The last lines of `metrics.jsonl`; a line that a kill cut is left out."""
    try:
        with file.open("rb") as metrics:
            metrics.seek(max(0, os.fstat(metrics.fileno()).st_size - TAIL_BYTES))
            raw = metrics.read().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for line in raw:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines


def _all_runs() -> tuple[str, bool]:
    jobs = client.own_jobs()
    rows = []
    for job in jobs:
        recent = tail_metrics(JobDir(job.run_dir).run.metrics)
        state = f"{job.state}{f' ({job.reason})' if job.reason else ''}"
        rows.append(f"{job.id:<9}{state:<28}{job.left:<12}{_step_line(recent) if recent else '-':<60}{job.run_dir}")
    head = f"{'job':<9}{'state':<28}{'time left':<12}{'step':<60}run"
    return "\n".join([head, *rows]) if rows else "no job of yours in the queue", bool(jobs)


def _job_line(job_id: str | None, job: Job | None, job_dir: JobDir) -> str:
    if job_id is None:
        return "none: not submitted yet"
    if job is None:
        return f"{job_id}: Slurm has forgotten it (asked squeue, scontrol, sacct)"
    lives = sum(line["event"] == "begin" and line["job"] == job_id for line in jsonl.read(job_dir.attempts))
    parts = [f"{job.id} {job.state}{f' on {job.nodes}' if job.nodes else ''}", f"life {lives}", f"{job.elapsed} in this life"]
    parts += [f"{job.left} to its limit"] if job.left and job.state == "RUNNING" else []
    return f"{', '.join(parts)} (from {job.origin})"


def _step_line(recent: list[dict[str, Any]]) -> str:
    last = recent[-1]
    loss = math.nan if last["loss/train"] is None else last["loss/train"]  # JSON knows no NaN
    parts = [f"{last['step']}", f"{last.get('progress', 0):.1%}", f"loss {loss:.3f}"]
    speeds = [line["throughput/tokens_per_s"] for line in recent[-20:] if "throughput/tokens_per_s" in line]
    parts += [f"{sum(speeds) / len(speeds):,.0f} tokens/s"] if speeds else []
    parts += [f"MFU {last['throughput/mfu']:.1%}"] if last.get("throughput/mfu") else []
    life = [line for line in recent if line["life"] == last["life"]]
    gained = last.get("progress", 0) - life[0].get("progress", 0)
    if gained > 0 and last["progress"] < 1:
        left = (last["time"] - life[0]["time"]) / gained * (1 - last["progress"])
        parts.append(f"left {timedelta(seconds=round(left))}")
    return ", ".join(parts)


def _ago(moment: float) -> str:
    return f"{timedelta(seconds=max(0, round(time.time() - moment)))} ago"

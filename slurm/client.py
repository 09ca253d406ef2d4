"""What Slurm's own commands say: the only place that runs them.

Invariant: output is read through formats that every version has, never through JSON; what a command refuses becomes a UserError that
quotes it.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import TryAgainError, UserError

COMMENT = "xc-slurm "
"""Begins the comment of our jobs; the run directory follows."""

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")

WAITS = {
    "BeginTime": "not before a set time, as after a requeue",
    "Dependency": "for the stage before",
    "JobHeld": "held (scontrol release goes on)",
    "Priority": "others come first",
    "ReqNodeNotAvail": "nodes that it needs are down, reserved or excluded",
    "Resources": "for free nodes",
}
"""What Slurm's commonest reasons mean."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it waits, or nothing."""
    elapsed: str
    left: str
    """Time to the limit of this life."""
    nodes: str
    origin: str
    """The command that knew: squeue, scontrol or sacct."""
    run_dir: str = ""
    starts: str = ""
    """When Slurm expects a waiting job to start, if it has an idea."""

    @property
    def waits(self) -> str:
        """Why it waits, in words as well as in Slurm's, and until when."""
        words = [self.reason, *(means for reason, means in WAITS.items() if self.reason.startswith(reason))]
        return ", ".join([*words, *([f"expected to start at {self.starts}"] if self.starts else [])])

    @property
    def ended(self) -> bool:
        """Whether it is over: not waiting, not running, and not about to be requeued."""
        return self.state.split()[0].rstrip("+") in ENDED


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands.

    Raises:
        UserError: it is not installed here.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"no {command[0]} on this machine (run this where Slurm's commands are: a login node)")
    return subprocess.run(command, input=stdin, text=True, capture_output=True)


def test_only(script: str) -> str:
    """Asks sbatch whether it would take the script; returns what it says (start estimate, nodes).

    Raises:
        UserError: it would not.
    """
    result = run("sbatch", "--test-only", stdin=script)
    said = _last_line(result.stderr) or _last_line(result.stdout)
    if result.returncode:
        raise UserError(f"sbatch refuses the job: {said} (mend the slurm section; {largest_node()})")
    return said


def submit(script: str | Path, after: str | None = None) -> str:
    """Hands a script, its file or its text, to sbatch; returns the job's id. `after` names a job that must have finished well, or this one
    is cancelled.

    Raises:
        UserError: sbatch refused.
    """
    file, stdin = ((str(script),), None) if isinstance(script, Path) else ((), script)
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    result = run("sbatch", "--parsable", *waits, *file, stdin=stdin)
    if result.returncode:
        raise UserError(
            f"sbatch refuses the job: {_last_line(result.stderr)} (mend the slurm section, or of an array --tasks and --sbatch)"
        )
    return result.stdout.strip().split(";")[0]


def gpus_by_partition() -> dict[str, int]:
    """Most GPUs of a node, by partition; the default partition has the name "" besides its own."""
    found: dict[str, int] = {}
    for line in run("sinfo", "--noheader", "--format=%P|%G").stdout.splitlines():
        partition, _, gres = line.partition("|")
        counts = [int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)]
        for name in {partition.rstrip("*"), "" if partition.endswith("*") else partition}:
            found[name] = max(found.get(name, 0), *counts, 0)
    return found


def largest_node() -> str:
    """What the partitions offer, in words."""
    return "; ".join(f"partition {name} has {gpus} GPUs a node" for name, gpus in sorted(gpus_by_partition().items()) if name)


def node_names() -> set[str]:
    """The nodes of the cluster; none where it does not say."""
    return set(run("sinfo", "--all", "--Node", "--noheader", "--format=%N").stdout.split())


def find(job: str) -> Job | None:
    """A job from squeue, else scontrol (a while after its end), else sacct (where the site keeps accounts).

    Raises:
        TryAgainError: Slurm does not answer.
    """
    return next(iter(_queued(f"--jobs={job}")), None) or _remembered(job) or _accounted(job)


def own_jobs() -> list[Job]:
    """The jobs of this user that `xc-slurm submit` made and that have not ended.

    Raises:
        TryAgainError: Slurm does not answer.
    """
    return [job for job in _queued("--me") if job.run_dir]


_FORMAT = "%i|%T|%r|%M|%L|%N|%S|%k"


def _parse(line: str) -> Job:
    job, state, reason, elapsed, left, nodes, starts, comment = line.split("|", 7)
    run_dir = comment[len(COMMENT) :] if comment.startswith(COMMENT) else ""
    starts = starts if state == "PENDING" and starts != "N/A" else ""
    return Job(job, state, "" if reason == "None" else reason, elapsed, left, nodes, "squeue", run_dir, starts)


def _queued(which: str) -> list[Job]:
    result = run("squeue", "--noheader", which, f"--format={_FORMAT}")
    if result.returncode and "Invalid job id" not in result.stderr:
        raise TryAgainError(f"squeue: {_last_line(result.stderr)} (slurmctld may be away for some minutes: run the same again)")
    return [_parse(line) for line in result.stdout.splitlines()]


def _remembered(job: str) -> Job | None:
    result = run("scontrol", "show", "job", job)
    if result.returncode or not result.stdout.strip():
        return None
    fields = {k: v for line in result.stdout.splitlines()[1:] for k, _, v in (part.partition("=") for part in line.split())}
    reason = "" if fields.get("Reason") == "None" else fields.get("Reason", "")
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return Job(job, fields.get("JobState", "UNKNOWN"), reason, fields.get("RunTime", ""), "", nodes, "scontrol")


def _accounted(job: str) -> Job | None:
    if shutil.which("sacct") is None:
        return None
    result = run("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State,Elapsed,NodeList,Reason")
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        return None
    state, elapsed, nodes, reason = lines[0].split("|", 3)
    return Job(job, state, "" if reason == "None" else reason, elapsed, "", nodes, "sacct")


def _last_line(text: str) -> str:
    lines = [line.removeprefix("sbatch: error: ").removeprefix("sbatch: ") for line in text.strip().splitlines()]
    # The first line of a refusal names the cause; what follows repeats that the submission failed.
    return lines[0].strip() if lines else ""

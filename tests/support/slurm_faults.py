"""What happens to jobs on a cluster, done to a running one.

Invariant: a fault returns once the job lives again (or has ended), with the nodes mended: nobody touches the job itself in between.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slurm_runs import Cluster, SlurmStage

Fault = Callable[[Cluster, SlurmStage, str], None]
BACK_S = 240
"""How long Slurm and a busy machine may take to begin the next life."""


@dataclass(frozen=True)
class Scenario:
    """A fault, and how the stage is submitted that meets it."""

    fault: Fault
    slurm: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the slurm section."""
    lossless: bool = False
    """Whether the ranks hear of it in time to checkpoint."""
    policy: str | None = None
    """Line of slurm.conf that it needs; "" = none of the kind."""
    prepare: Callable[[Cluster, SlurmStage], None] | None = None
    """What is done to the cluster before the stage is submitted."""


def warning(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """What Slurm sends to the job script ahead of a time limit."""
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    lives_again(stage)


def time_limit(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """Slurm warns by itself."""
    lives_again(stage)


def requeue(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """By an administrator."""
    cluster.run("scontrol", "requeue", job)
    lives_again(stage)


def preemption(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """By a job that needs just these nodes."""
    nodes = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    other = ["--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    cluster.run("sbatch", "--parsable", *other)
    lives_again(stage)


def killed_rank(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """SIGKILL, as by the kernel when memory is short."""
    stage.signal_rank(random.randrange(2), "KILL")
    lives_again(stage)


def frozen_rank(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """It does nothing any more, and its node is fine: only the watchdog of another rank sees it."""
    stage.signal_rank(random.randrange(2), "STOP")
    lives_again(stage)


def power_cut(position: int) -> Fault:
    """Of the node at this position of the job; at 0 the job script dies as well."""

    def fault(cluster: Cluster, stage: SlurmStage, job: str) -> None:
        node = cluster.nodes_of(job)[position]
        died = time.time()
        cluster.call("crash", node)
        lives_again(stage)
        cluster.call("boot", node)
        stage.notes["died"] = died

    return fault


def frozen_node(position: int) -> Fault:
    """Of the node at this position of the job. It wakes up while the next life trains: what it goes on with must harm nobody."""

    def fault(cluster: Cluster, stage: SlurmStage, job: str) -> None:
        node = cluster.nodes_of(job)[position]
        cluster.call("hang", node)
        try:
            lives_again(stage)
            stage.wait(lambda: len(stage.resumed_from()) > 1, BACK_S, "the next life's first step")
        finally:
            cluster.call("thaw", node)

    return fault


def cannot_write(position: int) -> Callable[[Cluster, SlurmStage], None]:
    """The run directory is read-only on the node that will have this position; at 0 not even the job's log can be opened."""

    def prepare(cluster: Cluster, stage: SlurmStage) -> None:
        for folder in ("logs", "slurm"):
            (stage.path / folder).mkdir(parents=True)
        stage.notes["unfit"] = sorted(cluster.idle())[position]
        cluster.call("readonly", stage.notes["unfit"], str(stage.path))

    return prepare


def unfit(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """What happens has happened: the stage trains on other nodes."""
    assert stage.notes["unfit"] not in cluster.nodes_of(job)
    cluster.call("writable", stage.notes["unfit"], str(stage.path))


def lives_again(stage: SlurmStage) -> None:
    """Until the job's next life has begun, or the run is finished."""
    before = stage.notes["lives"]
    stage.wait(lambda: stage.begins() > before or stage.run.final.exists(), BACK_S, "the next life")


WATCHED = {"watchdog": {"forward": 5.0, "data": 5.0}}
SCENARIOS = {
    "other node unfit": Scenario(unfit, {"preflight": {"slowest": 0.0}}, prepare=cannot_write(1)),
    "first node unfit": Scenario(unfit, prepare=cannot_write(0)),
    "warning": Scenario(warning, lossless=True),
    "time limit": Scenario(time_limit, {"time": "1", "warn": 35, "retries": 9}, lossless=True),  # the warning may come 30 s early: at once
    "scontrol requeue": Scenario(requeue),
    "preemption": Scenario(preemption, lossless=True, policy=""),
    "killed rank": Scenario(killed_rank),
    "frozen rank": Scenario(frozen_rank),
    "first node without power": Scenario(power_cut(0)),
    "other node without power": Scenario(power_cut(1)),
    "first node frozen": Scenario(frozen_node(0)),
    "other node frozen": Scenario(frozen_node(1)),
    "preemption with a warning": Scenario(preemption, lossless=True, policy="SlurmctldParameters=preempt_send_user_signal"),
}

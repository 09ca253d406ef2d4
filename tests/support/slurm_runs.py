"""A stage on a real Slurm: submitted by the real command, watched and disturbed from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from train.run_dir import RunDir

NODES = 16


@dataclass(frozen=True)
class Cluster:
    """tests/slurm/cluster.sh with its environment."""

    script: Path
    environment: dict[str, str]

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """up, down, crash NODE, boot NODE, pids NODE, ..."""
        # Daemons inherit what they are given: pipes would stay open for as long as they live.
        return subprocess.run(
            [str(self.script), *arguments], env=self.environment, text=True, capture_output=True, check=check, timeout=300
        )

    def anew(self) -> None:
        """The same cluster, which remembers nothing; no job may be on it."""
        self.call("down")
        self.call("up", str(NODES))

    def run(self, *command: str) -> str:
        """One of Slurm's commands; returns what it says."""
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, check=True).stdout.strip()

    def nodes_of(self, job: str) -> list[str]:
        """Nodes that a job runs on, in the order of their ranks."""
        return self.run("scontrol", "show", "hostnames", self.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")).split()

    def idle(self) -> list[str]:
        """Nodes that wait for work."""
        return self.run("sinfo", "--noheader", "--partition=train", "--Node", "--states=idle", "--format=%N").split()


@dataclass
class SlurmStage:
    """A config on disk and its run directory."""

    config: Path
    path: Path
    environment: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)
    """What a test remembers of it."""

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return RunDir(self.path)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """An `xc-slurm` command to its end."""
        command = [sys.executable, "-m", "slurm.cli", *arguments]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=300)

    def submit(self, *arguments: str) -> str:
        """`xc-slurm submit`; returns the job's id."""
        result = self.command("submit", str(self.config), *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[2].rstrip(":")

    def train_without_slurm(self, procs: int = 2) -> None:
        """`xc-train run` on this machine, with as many ranks: what a job's result is compared with."""
        command = [sys.executable, "-m", "train.cli", "run", str(self.config), "--procs", str(procs)]
        result = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=600)
        assert result.returncode == 0, result.stderr

    def signal_rank(self, rank: int, name: str) -> None:
        """A signal to one rank, on whichever node it is."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = b"python" in arguments[0] and arguments[-2:] == [str(self.path).encode(), b""]  # train.rank, or what stands in for it
            if ours and f"RANK={rank}".encode() in variables:
                os.kill(int(folder.name), signal.Signals[f"SIG{name}"])
                return
        raise AssertionError(f"rank {rank} does not run")

    def losses(self) -> dict[int, float]:
        """Loss of each step, the newest life's where a step was replayed."""
        return {line["step"]: line["loss/train"] for line in self.metrics()}

    def metrics(self) -> list[dict[str, Any]]:
        """What each step showed."""
        return jsonl.read(self.run.metrics)

    def attempts(self) -> list[dict[str, Any]]:
        """Begins and ends of lives, as the job noted them."""
        return jsonl.read(self.path / "slurm" / "attempts.jsonl")

    def begins(self) -> int:
        """Lives that the job has begun."""
        return sum(line["event"] == "begin" for line in self.attempts())

    def resumed_from(self) -> list[int | None]:
        """The step that each life went on from."""
        return [event["resumed_from"] for event in self.run.events() if event["event"] == "start"]

    def log(self) -> str:
        """What the job said."""
        file = self.run.logs / "slurm.log"
        return file.read_text() if file.exists() else "(no slurm.log)"

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        """Until `metrics.jsonl` shows it."""
        self.wait(lambda: step in self.losses(), seconds, f"step {step}")

    def wait_for_end(self, cluster: Cluster, job: str, seconds: float = 600) -> str:
        """Until the job has left the queue; returns its state."""
        self.wait(
            lambda: not cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").startswith(_ALIVE),
            seconds,
            "the end",
            every=1.0,  # it asks Slurm
        )
        return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str, every: float = 0.1) -> None:
        """Polls; fails with what the job said."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; the job said:\n{self.log()}"
            time.sleep(every)


_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch raises, as on a login node that has none."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('no torch on this machine')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}

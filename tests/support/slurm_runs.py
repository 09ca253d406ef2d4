"""A stage on a real Slurm: submitted by the real command, watched and disturbed from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from train.run_dir import RunDir


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

    def run(self, *command: str) -> str:
        """One of Slurm's commands; returns what it says."""
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, check=True).stdout.strip()


@dataclass
class SlurmStage:
    """A config on disk and its run directory."""

    config: Path
    path: Path
    environment: dict[str, str]

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return RunDir(self.path)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """An `xc-slurm` command to its end."""
        command = [sys.executable, "-m", "slurm.cli", *arguments]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=120)

    def submit(self, *arguments: str) -> str:
        """`xc-slurm submit`; returns the job's id."""
        result = self.command("submit", str(self.config), *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[2].rstrip(":")

    def train_without_slurm(self) -> None:
        """`xc-train run` on this machine, with as many ranks: what a job's result is compared with."""
        command = [sys.executable, "-m", "train.cli", "run", str(self.config), "--procs", "2"]
        result = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=600)
        assert result.returncode == 0, result.stderr

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank, on whichever node it is."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"train.rank" in arguments and str(self.path).encode() in arguments and f"RANK={rank}".encode() in variables:
                os.kill(int(folder.name), signal.SIGKILL)
                return
        raise AssertionError(f"rank {rank} does not run")

    def losses(self) -> dict[int, float]:
        """Loss of each step, the newest life's where a step was replayed."""
        return {line["step"]: line["loss/train"] for line in jsonl.read(self.run.metrics)}

    def attempts(self) -> list[dict[str, Any]]:
        """Begins and ends of lives, as the job noted them."""
        return jsonl.read(self.path / "slurm" / "attempts.jsonl")

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

    def wait_for_end(self, cluster: Cluster, job: str, seconds: float = 200) -> str:
        """Until the job has left the queue; returns its state."""
        self.wait(
            lambda: not cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").startswith(_ALIVE),
            seconds,
            "the end",
        )
        return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Polls; fails with what the job said."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; the job said:\n{self.log()}"
            time.sleep(0.1)


_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch raises, as on a login node that has none."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('no torch on this machine')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}

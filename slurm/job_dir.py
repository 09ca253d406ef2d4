"""What `xc-slurm` leaves in a run directory, and what it reads of it from outside the job.

    job.sbatch            the job script as it was submitted
    code/                 the code as it was submitted; every life runs it      code/commit.json, code/changes.diff   where it came from
    slurm/job.json        id of the newest job                                  slurm/attempts.jsonl   begins and ends of its lives
    slurm/preflight-*     what each node said before a life                     logs/slurm.log         what the job script said

Invariant: nothing lives only in the job: whoever sees the run directory knows what is running, and how its lives went.
"""

import getpass
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from train.run_dir import RunDir, read_json, write_atomic, write_json

PACKAGES = ("data_pipeline", "train", "slurm", "compose")


class JobDir:
    """Paths of what belongs to the job, beside those of the run."""

    def __init__(self, path: str | Path) -> None:
        self.run = RunDir(path)
        self.path = self.run.path
        self.script = self.path / "job.sbatch"
        self.code = self.path / "code"
        self.folder = self.path / "slurm"
        self.job = self.folder / "job.json"
        self.attempts = self.folder / "attempts.jsonl"
        self.log = self.run.logs / "slurm.log"

    @staticmethod
    def existing(path: str | Path) -> "JobDir":
        """The job directory of a run that was submitted.

        Raises:
            UserError: it was not.
        """
        found = JobDir(path)
        if not found.run.config.exists():
            raise UserError(f"{path} is no run directory: no config.yaml in it (give the directory of run.dir)")
        return found

    def job_id(self) -> str | None:
        """Id of the newest job; None where the run was never submitted."""
        job = read_json(self.job)
        return str(job["job"]) if job else None

    def write_job(self, job: str) -> None:
        """Notes a submission."""
        write_json(self.job, {"job": job, "time": time.time(), "user": getpass.getuser(), "host": socket.gethostname()})

    def freeze(self, config: str, script: str) -> None:
        """Writes the resolved config, the code and the job script; what an earlier job left of them is replaced."""
        self.run.create()
        self.folder.mkdir(exist_ok=True)
        write_atomic(self.run.config, config.encode())
        write_atomic(self.script, script.encode())
        partial = self.path / ".code.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _copy_code(partial)
        shutil.rmtree(self.code, ignore_errors=True)
        partial.replace(self.code)


def newest_checkpoint(run: RunDir) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    return max((int(p.parent.name[5:]) for p in run.checkpoints.glob("step-*/manifest.json")), default=0)


def _copy_code(folder: Path) -> None:
    """The packages of this installation, and what git knows about them."""
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # An environment that lies inside some repository is no part of it.
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else ""
    changes = _git(root, "diff", "HEAD", "--", *(n for n in PACKAGES if (root / n).is_dir())) if commit else ""
    about: dict[str, Any] = {"commit": commit.strip() or None, "changed": bool(changes), "from": str(root)}
    (folder / "commit.json").write_text(json.dumps(about, indent=1))
    (folder / "changes.diff").write_text(changes)


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace")
    return result.stdout if result.returncode == 0 else ""

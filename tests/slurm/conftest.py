"""A real Slurm for the tests: one cluster of sixteen nodes for the session, started when the first test asks for it and gone afterwards.

Invariant: where Slurm cannot run (not root, no packages, no namespaces) the tests are skipped with the reason, never passed.
"""

import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stand_in_rank
import yaml
from slurm_runs import NODES, Cluster, SlurmStage
from stages import stage_settings

SCRIPT = Path(__file__).parent / "cluster.sh"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, in a directory of its own; its daemons end with the session."""
    if os.geteuid() != 0:
        pytest.skip("a real Slurm needs root: namespaces, /etc/hosts")
    if shutil.which("slurmctld") is None:
        pytest.skip("no slurmctld here (apt-get install slurmctld slurmd slurm-client munge)")
    if subprocess.run(["unshare", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("a real Slurm needs CAP_SYS_ADMIN: its nodes are namespaces")
    state = tmp_path_factory.mktemp("slurm")
    ports = {"CTLD_PORT": str(free := _free_ports(NODES + 2)), "SLURMD_PORT": str(free + 1)}
    where = {
        "SLURM_CLUSTER_DIR": str(state / "cluster"),
        "SLURM_CONF": str(state / "cluster/slurm.conf"),
        "SLURM_CLUSTER_OWNER": str(os.getpid()),
    }
    made = Cluster(SCRIPT, {**os.environ, **where, **ports})
    started = made.call("up", str(NODES), check=False)
    if started.returncode:
        made.call("down", check=False)
    assert started.returncode == 0, started.stderr
    try:
        yield made
    finally:
        made.call("down")


def _free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens on, below those that the kernel hands out."""
    while True:
        first = random.randrange(16000, 30000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first


MakeStage = Callable[..., SlurmStage]


@pytest.fixture(scope="session")
def make_slurm_stage(demo: Any) -> MakeStage:
    """Writes a stage with a slurm section into a folder: two nodes, a rank each, no GPUs; keyword arguments replace sections' keys."""

    def make(folder: Path, name: str = "run", environment: dict[str, str] | None = None, **sections: dict[str, Any]) -> SlurmStage:
        settings = stage_settings(demo, folder / name)
        settings["slurm"] = {
            "nodes": 2,
            "gpus_per_node": 0,
            "time": "20",
            "warn": 60,
            "cordon": str(folder / "cordon.jsonl"),
            "preflight": {"enabled": False},
        }
        for section, changes in sections.items():
            settings.setdefault(section, {}).update(changes)
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return SlurmStage(config, folder / name, environment or dict(os.environ))

    return make


@pytest.fixture
def slurm_stage(make_slurm_stage: MakeStage, tmp_path: Path) -> MakeStage:
    """As `make_slurm_stage`, in the test's folder."""
    return partial(make_slurm_stage, tmp_path)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python for `slurm.python` whose ranks need no torch (tests/support/stand_in_rank.py)."""
    python = tmp_path_factory.mktemp("python") / "python"
    rank = shlex.join([sys.executable, stand_in_rank.__file__])
    python.write_text(f'#!/bin/bash\n[ "$2" != train.rank ] || exec {rank} "$3"\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return str(python)

"""A real Slurm for the tests: one cluster of four nodes for the session, started when the first test asks for it and gone afterwards.

Invariant: where Slurm cannot run (not root, no packages, no namespaces) the tests are skipped with the reason, never passed.
"""

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_runs import Cluster, SlurmStage
from stages import stage_settings

SCRIPT = Path(__file__).parent / "cluster.sh"
NODES = 4


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
    ports = {"CTLD_PORT": str(free := _free_ports(NODES + 2)), "SLURMD_PORT": str(free + 1)}  # sessions beside this one have theirs
    where = {"SLURM_CLUSTER_DIR": str(state / "cluster"), "SLURM_CONF": str(state / "cluster/slurm.conf")}
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


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Where ranks of tests run: one thread each, the extensions that `make install` compiled."""
    from train.device import prepare_deepspeed

    prepare_deepspeed()
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture
def slurm_stage(demo: Any, tmp_path: Path) -> Callable[..., SlurmStage]:
    """Writes a stage with a slurm section: two nodes, a rank each, no GPUs; keyword arguments replace whole sections' keys."""

    def make(name: str = "run", environment: dict[str, str] | None = None, **sections: dict[str, Any]) -> SlurmStage:
        settings = stage_settings(demo, tmp_path / name)
        settings["slurm"] = {
            "nodes": 2,
            "gpus_per_node": 0,
            "time": "20",
            "warn": 60,
            "cordon": str(tmp_path / "cordon.jsonl"),
            "preflight": {"enabled": False},
        }
        for section, changes in sections.items():
            settings.setdefault(section, {}).update(changes)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return SlurmStage(config, tmp_path / name, environment or dict(os.environ))

    return make

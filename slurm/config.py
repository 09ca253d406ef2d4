"""The `slurm` section of a stage's YAML: what a job asks of the cluster, and how it heals.

Invariant: no torch here, and every value that reaches a shell is plain data; only `slurm.setup` is shell, as its docstring says.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from data_pipeline import configure


class Network(Enum):
    """Which settings NCCL gets for the fabric between nodes; a variable that is set already is left as it is."""

    auto = "auto"  # none: NCCL looks for itself
    infiniband = "infiniband"  # Mellanox adapters only; waits through a flapping link
    efa = "efa"  # AWS Elastic Fabric Adapter, with RDMA
    ethernet = "ethernet"  # plain TCP, where InfiniBand is there but broken

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of this preset."""
        return {
            "auto": {},
            "infiniband": {"NCCL_IB_HCA": "mlx5", "NCCL_IB_TIMEOUT": "22", "NCCL_IB_RETRY_CNT": "13"},
            "efa": {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"},
            "ethernet": {"NCCL_IB_DISABLE": "1"},
        }[self.value]


@dataclass
class PreflightConfig:
    """What every node must show before the first step of a life."""

    enabled: bool = True
    slowest: float = 0.7
    """Smallest matmul rate of a node, as a share of the median over the job's nodes; 0 = measured, not judged."""
    clock_skew: float = 5.0
    """Largest difference of a node's clock from the median, in seconds."""
    timeout: int = 300
    """Seconds that all of it may take; a node that has said nothing by then has failed."""


@dataclass
class SlurmConfig:
    """One job: a stage on `nodes` nodes, one task a rank."""

    nodes: int = 1
    """Nodes; the world size is nodes x ranks_per_node."""
    gpus_per_node: int = 8
    """GPUs a node; 0 trains on CPUs."""
    ranks_per_node: int | None = None
    """Ranks a node; one a GPU by default, one where there is no GPU."""
    cpus_per_rank: int | None = None
    """Cores a rank, data workers included: give it; else the site's default, often one."""
    mem: str | None = "0"
    """Memory a node; 0 = all of it."""
    exclusive: bool = True
    """No other job on these nodes."""
    time: str = "24:00:00"
    """Time limit of one life; a run takes as many lives as it needs."""
    warn: int = 300
    """Seconds ahead of the time limit at which ranks are asked to checkpoint; more than a step and a checkpoint take."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    """Feature that nodes must have."""
    exclude: list[str] = field(default_factory=list)
    """Nodes that are not used, besides those of the cordon file."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that are loaded before anything starts."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job. Secrets do not belong here: sbatch passes on your shell's."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run on the first node behind `modules` and `env`, as they are: the one place where the config is shell."""
    network: Network = Network.auto
    """auto, infiniband, efa or ethernet."""
    container: str | None = None
    """Image for the ranks (`srun --container-image`; the site must have pyxis). The job script itself runs outside."""
    container_mounts: list[str] = field(default_factory=list)
    """`source:target` pairs; the run directory is mounted in any case."""
    python: str | None = None
    """Python of the ranks; by default the one that `xc-slurm submit` runs under, which must then lie on a shared file system."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, one an item: `--mail-type=END`."""
    srun: list[str] = field(default_factory=list)
    """Further options of the srun that starts the ranks, one an item: `--cpu-bind=none`."""
    retries: int = 3
    """Lives in a row without a new checkpoint after which the job stops (exit code 71)."""
    cordon: str = "~/.xc-slurm/cordon.jsonl"
    """Nodes that failed preflight, a line each with the reason: no job of yours uses them until the line is deleted."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def time_s(self) -> int:
        """The time limit in seconds, read as sbatch does.

        Raises:
            ValueError: it is no time limit.
        """
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if len(parts) > 3 or min(parts) < 0:
            raise ValueError(self.time)
        if dash:  # D-H, D-H:M, D-H:M:S
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:  # M, M:S, H:M:S
            hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    @property
    def tasks_per_node(self) -> int:
        """Ranks a node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node

    @property
    def cordon_file(self) -> Path:
        """The cordon file, with `~` resolved."""
        return Path(self.cordon).expanduser()


@dataclass
class _Run:
    name: str = MISSING
    dir: str = MISSING


@dataclass
class _View:
    """What this package's own section is read through."""

    run: _Run = field(default_factory=_Run)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SlurmConfig:
    """The `slurm` section of a stage's YAML.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    return configure.load(_View, path, overrides, keep=("run.name", "run.dir", "slurm")).slurm

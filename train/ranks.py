"""The process group: who this rank is, and what ranks agree on.

Invariant: anything that only one rank knows (a stop request, dropped samples, its supervised tokens) becomes a decision only after
`agree`, which all ranks call once a step. It runs on the host over gloo, so that it never waits for a GPU.
"""

import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait for the slowest rank; loading and checkpointing happen in between."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that hold the same packs, a part of the tokens each (`parallel.sequence`); a rank of its own where there are no parts."""

    number: int
    """Of this group among the groups: to the data, the rank."""
    groups: int
    """How many groups there are: to the data, the world size."""
    rank: int
    """Of this process in the group."""
    size: int
    group: dist.ProcessGroup | None
    """For the exchange of heads; none in a group of one."""

    @staticmethod
    def join(rank: int, groups: int, size: int) -> "SequenceGroup":
        """The group of rank `rank` of `groups` x `size`, neighbours together; each makes its own, and waits for no other."""
        number, place = divmod(rank, size)
        if size == 1:
            return SequenceGroup(number, groups, place, size, None)
        members = range(number * size, (number + 1) * size)
        return SequenceGroup(number, groups, place, size, dist.new_group(members, timeout=TIMEOUT, use_local_synchronization=True))

    def doubt(self, value: int) -> int:
        """An integer whose sum over all ranks is 0 where the ranks of each group have the same value, below 2 ** 32; else hardly ever."""
        return value * (self.size - 1 if self.rank == 0 else -1)


@dataclass(frozen=True)
class Ranks:
    """One process among the others."""

    rank: int
    world: int
    control: dist.ProcessGroup | None
    """gloo group for small host-side agreements."""
    background: dist.ProcessGroup | None = None
    """Another one, for the thread that writes checkpoints: its agreements must not meet those of the loop."""

    def in_background(self) -> "Ranks":
        """The same ranks, for use in another thread."""
        return replace(self, control=self.background)

    def agree(self, values: list[int]) -> list[int]:
        """Sums integers over all ranks."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def nodes(self) -> list[str]:
        """The name of each rank's node; all ranks call it."""
        return [str(node) for node in self.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())]

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""
        dist.barrier(group=self.control)


def from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank, as torchrun or srun's wrapper set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))


def join(backend: str) -> Ranks:
    """Joins the process group that the environment describes."""
    import deepspeed

    rank, world, _ = from_environment()
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, auto_mpi_discovery=False, verbose=False)
    ranks = Ranks(rank, world, *(dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)))
    ranks.barrier()
    _unname_shared_memory(rank)
    return ranks


def _unname_shared_memory(rank: int) -> None:
    """Takes the name from the memory that DeepSpeed's CPU kernel shares between ranks: all have mapped it by now.

    Nothing else would: with its name, each rank's 66 MiB outlive every end of a run, and fill the machine's memory in time.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)

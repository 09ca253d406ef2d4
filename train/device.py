"""What the machine offers: the device and its fast number format.

Invariant: the choice is made once, by `choose`, and logged; nothing else asks the hardware.
"""

import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import TryAgainError, UserError
from train.config import Precision

_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


@dataclass(frozen=True)
class Device:
    """Where a rank computes and in which format."""

    torch_device: torch.device
    dtype: torch.dtype
    reason: str
    """Why this format; for the log."""

    @property
    def backend(self) -> str:
        """Backend of collectives on this device."""
        return "nccl" if self.torch_device.type == "cuda" else "gloo"

    @property
    def name(self) -> str:
        """The GPU's name; `cpu` where there is none."""
        return torch.cuda.get_device_name(self.torch_device) if self.torch_device.type == "cuda" else "cpu"

    def most_memory(self) -> int:
        """Most bytes that this process has used at once: of the GPU's memory where there is one, else resident."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose(precision: Precision, local_rank: int) -> Device:
    """The device of a rank and the format that `train.precision` means on it.

    Raises:
        UserError: a machine with GPUs has none for this rank.
        TryAgainError: Slurm gave GPUs to the job and torch finds none: as a rank on the CPU it would hang all others.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if given != "0" and not torch.cuda.is_available():
        node = os.environ.get("SLURMD_NODENAME", platform.node())
        raise TryAgainError(
            f"{node}: Slurm gave {given} GPUs and torch finds none (see nvidia-smi there; preflight leaves such a node out)"
        )
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise too_many_ranks(local_rank + 1, torch.cuda.device_count())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if precision is not Precision.auto:
        return Device(device, torch.bfloat16 if precision is Precision.bf16 else torch.float32, "as configured")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(device, torch.bfloat16 if fast else torch.float32, f"GPU {'has' if fast else 'lacks'} bf16")
    fast = cpu_has_bf16()
    return Device(device, torch.bfloat16 if fast else torch.float32, f"processor {'has' if fast else 'lacks'} bf16")


def require_one_format(precision: Precision, found: Sequence[tuple[str, str]]) -> None:
    """Refuses ranks, each with its node and number format, that would send each other tensors of different sizes.

    Raises:
        UserError: which nodes differ; on all ranks alike.
    """
    nodes = {dtype: node for node, dtype in reversed(found)}
    if len(nodes) > 1:
        said = " and ".join(f"{dtype.removeprefix('torch.')} on {node}" for dtype, node in sorted(nodes.items()))
        raise UserError(f"train.precision: {precision.value} is {said} (set it to fp32 or bf16, or use machines of one kind)")


def too_many_ranks(ranks: int, gpus: int) -> UserError:
    """What is said of at least so many ranks on a machine, where each needs a GPU of its own."""
    cure = f"start {gpus}: --procs, slurm.ranks_per_node or torchrun's --nproc-per-node; or show each rank all GPUs: CUDA_VISIBLE_DEVICES"
    return UserError(f"{ranks} ranks on a machine that shows {gpus} {'GPU' if gpus == 1 else 'GPUs'} ({cure})")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware: with AMX 5 times as fast as fp32, with AVX-512 twice (docs/benchmarks.md).

    Others emulate it, at a hundredth of the speed.
    """
    return not _BF16_FLAGS.isdisjoint(" ".join(_cpuinfo("flags")).split())


def cpu_name() -> str:
    """What the processor is called."""
    return next(iter(_cpuinfo("model name")), platform.machine())


def _cpuinfo(field: str) -> list[str]:
    """A line a core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]

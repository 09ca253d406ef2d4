"""What the machine offers: the device, its fast number format, and DeepSpeed's compiled parts.

Invariant: the choice is made once, by `describe`, and logged; nothing else asks the hardware.
"""

import fcntl
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import Precision


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
    """The device of a rank and the format that `train.precision` means on it."""
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if precision is not Precision.auto:
        return Device(device, torch.bfloat16 if precision is Precision.bf16 else torch.float32, "as configured")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(device, torch.bfloat16 if fast else torch.float32, f"GPU {'has' if fast else 'lacks'} bf16")
    fast = "amx_bf16" in _cpu_flags()
    return Device(device, torch.bfloat16 if fast else torch.float32, f"processor {'has' if fast else 'lacks'} AMX")


def prepare_deepspeed() -> None:
    """Compiles DeepSpeed's CPU communication kernel, once a machine and visibly (about a minute; needs g++ and ninja).

    Ranks that compile it themselves do so silently, and one killed while compiling leaves a lock on which every later start waits
    for ever. Here the lock is the kernel's own (`flock`), which dies with its holder.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a CUDA compiler without a GPU must not be taken for a GPU
    # Another version of ninja takes what this environment's built for out of date, and builds it anew; so does ours what that one built.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default_extensions_dir())))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / f"prepared-{_versions()}"
        if stamp.exists():
            return
        print("compiling DeepSpeed's CPU communication kernel, once on this machine (about a minute) ...", file=sys.stderr, flush=True)
        for stale in folder.glob("deepspeed_shm_comm*"):
            shutil.rmtree(stale, ignore_errors=True)
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()
        stamp.touch()


def default_extensions_dir() -> Path:
    """Inside the Python environment: an environment that is deleted takes what it compiled with it."""
    return Path(sys.prefix) / "torch_extensions"


def _versions() -> str:
    from importlib.metadata import version

    return f"deepspeed-{version('deepspeed')}-torch-{version('torch')}"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}

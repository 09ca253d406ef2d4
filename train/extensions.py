"""DeepSpeed's compiled parts: made once a machine, visibly, before any rank waits for them.

Invariant: no torch until there is something to compile, so that a launcher starts its ranks at once.
"""

import fcntl
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path


def prepared() -> bool:
    """Whether there is nothing to compile any more; False where no kernel is needed, too."""
    return _stamp().exists()


def prepare_deepspeed() -> None:
    """Compiles DeepSpeed's CPU communication kernel, once a machine and visibly (about a minute; needs g++ and ninja).

    Ranks that compile it themselves do so silently, and one killed while compiling leaves a lock on which every later start waits
    for ever. Here the lock is the kernel's own (`flock`), which dies with its holder.
    """
    if not choose_accelerator():
        return
    # Always this environment's ninja: there may be no other, and one of another version hashes commands differently and compiles anew.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    stamp = _stamp()
    folder = stamp.parent
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists():
            return
        print("compiling DeepSpeed's CPU communication kernel, once on this machine (about a minute) ...", file=sys.stderr, flush=True)
        for stale in folder.glob("deepspeed_shm_comm*"):
            shutil.rmtree(stale, ignore_errors=True)
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()
        stamp.touch()


def choose_accelerator() -> bool:
    """To be called before DeepSpeed is imported: a CUDA compiler without a GPU must not be taken for a GPU. Whether ranks run on CPUs."""
    import torch

    if torch.cuda.is_available():
        return False
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return True


def _stamp() -> Path:
    # By default inside the Python environment: one that is deleted takes what it compiled with it.
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")
    return folder / f"prepared-deepspeed-{version('deepspeed')}-torch-{version('torch')}"

"""What one node can do, measured before the first step of a life: `python -m train.preflight RUN_DIR SECONDS`, one process a node, with
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

Invariant: it measures and never judges. It prints a JSON line as soon as it knows something, so that a node that hangs later has still
said what it could; the lines of a node add up.
"""

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.errors import EXIT_DONE

ROUNDS = 5
QUERY_S = 60
"""What a question to the driver may take: that of a GPU that fell off its bus may never be answered."""
GPU_SIDE, CPU_SIDE = 8192, 512
"""Sides of the square matrices that are multiplied."""
GPU_BYTES, CPU_BYTES = 256 << 20, 1 << 20
"""What is summed over the nodes."""
QUERIES = {
    "--query-gpu=index,ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "--query-remapped-rows=gpu_bus_id,remapped_rows.failure": "failed row remaps",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_dir, seconds = sys.argv[1:] if argv is None else argv
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    _say(node, versions=_versions(), write=_write_problem(Path(run_dir), node))
    gpus = torch.cuda.device_count()
    _say(node, gpus=gpus, gpu_problems=_gpu_problems() if gpus else [], tflops=_matmul_tflops())
    _say(node, **_together(timedelta(seconds=float(seconds) / 2)))
    os._exit(EXIT_DONE)  # a collective that failed must not hold the process


def _say(node: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"node": node, **facts}) + "\n")  # one write: lines of nodes must not mix
    sys.stdout.flush()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "nccl": nccl,
        "deepspeed": version("deepspeed"),
        "driver": _driver(),
    }


def _driver() -> str:
    try:
        return next(iter(_nvidia_smi("--query-gpu=driver_version")), "none")
    except subprocess.TimeoutExpired:
        return "silent"


def _write_problem(run_dir: Path, node: str) -> str | None:
    """Why this node cannot write and read in the run directory; None where it can."""
    probe = run_dir / f".preflight-{node}-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text(node)
        return None if probe.read_text() == node else "reads back other bytes than it wrote"
    except OSError as error:
        return str(error.strerror)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _gpu_problems() -> list[str]:
    """What the driver reports against a GPU; empty where it has nothing to say."""
    found = []
    for query, what in QUERIES.items():
        try:
            lines = _nvidia_smi(query)
        except subprocess.TimeoutExpired:
            return [*found, f"nvidia-smi did not answer in {QUERY_S:g} s"]
        for line in lines:
            gpu, _, count = line.rpartition(", ")
            if count.strip().isdigit() and int(count) > 0:
                found.append(f"GPU {gpu}: {what}: {count.strip()}")
    return found


def _nvidia_smi(query: str) -> list[str]:
    """Lines of the answer, none where there is no driver.

    Raises:
        TimeoutExpired: the driver does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    result = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=QUERY_S)
    return result.stdout.splitlines() if result.returncode == 0 else []


def _matmul_tflops() -> float:
    """TFLOPS of a square matmul: of the slowest GPU in bf16, or of one CPU thread in fp32. The best of some rounds each."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return _rate(torch.device("cpu"), CPU_SIDE, torch.float32)
    return min(_rate(torch.device("cuda", i), GPU_SIDE, torch.bfloat16) for i in range(torch.cuda.device_count()))


def _rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def _together(timeout: timedelta) -> dict[str, Any]:
    """What only all nodes together know: who is there, whose clock is off, and how long a sum over all takes."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    try:
        store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        store.set(f"here/{rank}", "1")
        try:
            store.wait([f"here/{r}" for r in range(world)], timeout)
        except dist.DistError:
            return {"absent": [r for r in range(world) if not store.check([f"here/{r}"])]}
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a sum that hangs is then an error here, not the end of every process
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        clocks = torch.zeros(world, dtype=torch.float64, device=device)
        summed = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
        times = []
        for _ in range(ROUNDS):
            dist.all_reduce(torch.zeros(1, device=device))
            began = time.perf_counter()
            dist.all_reduce(summed)
            float(summed[0])  # waits for the device
            times.append(time.perf_counter() - began)
            summed.fill_(1)
        dist.all_reduce(torch.zeros(1, device=device))
        now = time.time()
        clocks[rank] = now
        dist.all_reduce(clocks)
        store.set(f"done/{rank}", "1")
        if rank == 0:  # the store lives in this process
            store.wait([f"done/{r}" for r in range(world)], timeout)
        return {"all_reduce_ms": statistics.median(times) * 1e3, "clock_skew": now - statistics.median(clocks.tolist())}
    except RuntimeError as error:  # torch.distributed raises nothing narrower
        return {"all_reduce_problem": str(error).splitlines()[0]}


if __name__ == "__main__":
    main()

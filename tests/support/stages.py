"""A stage at test size on the demo's real shards, and ways to run it: the real command, real ranks, real DeepSpeed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import jsonl
from train.run_dir import RunDir

if TYPE_CHECKING:
    from conftest import Demo


def stage_settings(demo: "Demo", run_dir: Path) -> dict[str, Any]:
    """Pairs, documents and text; a model of 100,000 parameters; 10 steps of 4 short packs."""
    sources = {name: {"path": str(demo.source(name))} for name in ("pairs", "documents", "text")}
    return {
        "run": {"name": "test", "dir": str(run_dir), "stage": "pretrain", "seed": 7},
        "data": {
            "tokenizer": str(demo.tokenizer),
            "sources": sources,
            "context": 128,
            "images_per_pack": 12,
            "segments_per_pack": 24,
            "global_batch": 4,
            "window": 400,
            "images": {"size": 32, "tokens": 1, "crop": 0.1},
            "workers": 0,
        },
        "model": {
            "vision": {"name": "vit_tiny_patch16_224", "patch": 16, "overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
            "projector": {"merge": 2},
            "decoder": {"vocab": 4096, "hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "rope_theta": 10000.0},
            "plora": {"rank": 4, "alpha": 4.0, "dropout": 0.1},
        },
        "train": {"steps": 10, "lr": 0.003, "groups": [{"match": "vision", "layer_decay": 0.9}, {"match": ".*"}], "precision": "fp32"},
        "checkpoint": {"every": 4},
        "track": {"every": 1, "tensorboard": False, "wandb": False},
    }


@dataclass
class Stage:
    """A config on disk and its run directory."""

    config: Path
    run: RunDir
    environment: dict[str, str]

    def start(self, *arguments: str, procs: int = 2) -> subprocess.Popen[str]:
        """`xc-train run` in the background."""
        command = [sys.executable, "-m", "train.cli", "run", str(self.config), "--procs", str(procs), *arguments]
        return subprocess.Popen(command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def train(self, *arguments: str, procs: int = 2) -> subprocess.CompletedProcess[str]:
        """`xc-train run` to its end."""
        process = self.start(*arguments, procs=procs)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def losses(self) -> dict[int, float]:
        """Loss of each step, the newest life's where a step was replayed."""
        return {line["step"]: line["loss/train"] for line in jsonl.read(self.run.metrics)}

    def rank_pids(self) -> list[int]:
        """Processes of the running ranks."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"train.rank" in arguments and str(self.run.path).encode() in arguments:
                found.append(int(folder.name))
        return sorted(found)

    def kill_a_rank_after(self, step: int, process: subprocess.Popen[str], number: int) -> None:
        """SIGKILL to one rank as soon as `metrics.jsonl` shows the step."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if step in self.losses():
                os.kill(self.rank_pids()[number], signal.SIGKILL)
                return
            time.sleep(0.01)
        raise AssertionError(f"the run never reached step {step}")

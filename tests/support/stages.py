"""A stage at test size on the demo's real shards, and ways to run it: the real command, real ranks, real DeepSpeed."""

import atexit
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from data_pipeline import jsonl
from train.launch import free_port, rank_environment
from train.run_dir import RunDir, file_digest

if TYPE_CHECKING:
    from conftest import Demo


def stage_settings(demo: "Demo", run_dir: Path) -> dict[str, Any]:
    """Pairs, documents and text; a model of 100,000 parameters; 24 steps of 4 short packs."""
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
        "train": {"steps": 24, "lr": 0.003, "groups": [{"match": "vision", "layer_decay": 0.9}, {"match": ".*"}], "precision": "fp32"},
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
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def losses(self) -> dict[int, float]:
        """Loss of each step, the newest life's where a step was replayed."""
        return {line["step"]: line["loss/train"] for line in jsonl.read(self.run.metrics)}

    def weights(self) -> dict[str, bytes]:
        """The final weights, bit for bit."""
        import torch
        from safetensors.torch import load_file

        return {n: t.view(torch.uint8).numpy().tobytes() for n, t in load_file(self.run.final / "model.safetensors").items()}

    def saved(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step holds: digests of its tensors, and the state but for times and requests."""
        folder = self.run.checkpoints / f"step-{step:08d}"
        state = json.loads((folder / "state.json").read_text())
        del state["totals"]["step_ms"], state["totals"]["save"]
        return {**state, **{str(file.relative_to(folder)): file_digest(file) for file in sorted(folder.rglob("*.pt"))}}

    def resumed_from(self) -> list[int | None]:
        """The step that each life went on from."""
        return [event["resumed_from"] for event in self.run.events() if event["event"] == "start"]

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are visible."""
        return sorted(int(folder.name[5:]) for folder in self.run.checkpoints.glob("step-*"))

    def forget_after(self, step: int) -> None:
        """Takes from a finished run what came after the checkpoint of a step: as if it had been killed there."""
        shutil.rmtree(self.run.final)
        self.run.outcome.unlink()
        for later in [s for s in self.checkpoints() if s > step]:
            shutil.rmtree(self.run.checkpoints / f"step-{later:08d}")

    def said(self) -> str:
        """What the newest of `live_together` told the terminal."""
        return (self.run.logs / "said.txt").read_text()

    def wait_for(self, step: int, process: subprocess.Popen[str], life: int = 1) -> None:
        """Returns as soon as this life has done the step; the one before may have come further than its checkpoint."""
        deadline = time.monotonic() + 400
        while not any(line["life"] == life and line["step"] >= step for line in jsonl.read(self.run.metrics)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"the run never reached step {step}"
            time.sleep(0.01)

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

    def kill_a_rank_after(self, step: int, process: subprocess.Popen[str], number: int, life: int = 1) -> None:
        """SIGKILL to one rank as soon as this life has done the step."""
        self.wait_for(step, process, life)
        os.kill(self.rank_pids()[number], signal.SIGKILL)


def make_stage(demo: "Demo", environment: dict[str, str], run_dir: Path, sections: dict[str, dict[str, Any]]) -> Stage:
    """Writes the YAML of a stage beside its run directory; `sections` replace whole keys."""
    settings = stage_settings(demo, run_dir)
    for section, changes in sections.items():
        settings.setdefault(section, {}).update(changes)
    config = run_dir.with_name(f"{run_dir.name}.yaml")
    config.write_text(yaml.safe_dump(settings))
    return Stage(config, RunDir(run_dir), environment)


@dataclass(frozen=True)
class Life:
    """A stage and the overrides of its command line."""

    stage: Stage
    overrides: tuple[str, ...] = ()
    nan_gradients: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Steps in which a gradient is NaN, by rank."""
    reads_otherwise: Mapping[int, int] = field(default_factory=dict)
    """The step whose data a rank takes for others, by rank."""


def run_ranks(command: Sequence[str], environment: Mapping[str, str], world: int = 2) -> None:
    """A worker script as so many ranks, to their end; none is left where one fails or hangs."""
    port = free_port()
    ranks = [subprocess.Popen(command, env={**rank_environment(rank, world, port), **environment}) for rank in range(world)]
    try:
        assert {rank.wait(timeout=900) for rank in ranks} == {0}, "see what the ranks said"
    finally:
        for rank in ranks:
            rank.kill()


class WarmRanks:
    """Ranks that wait for lives (tests/support/lives_worker.py): starting them costs more than most lives of tests."""

    _kept: ClassVar[dict[int, "WarmRanks"]] = {}

    def __init__(self, world: int) -> None:
        worker, port = str(Path(__file__).with_name("lives_worker.py")), free_port()
        self._ranks, self._answers = [], []
        for rank in range(world):
            answers, answer = os.pipe()  # what libraries print goes to the rank's output
            environment = {**rank_environment(rank, world, port), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, worker, str(answer)]
            self._ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[answer]))
            self._answers.append(answers)
            os.close(answer)
        atexit.register(self.end)

    @classmethod
    def of(cls, world: int) -> "WarmRanks":
        """So many ranks, started when first asked for; they end with the tests."""
        if world not in cls._kept:
            cls._kept[world] = cls(world)
        return cls._kept[world]

    def live(self, jobs: Path) -> None:
        """Returns when all ranks have lived the lives of the file; where one dies or hangs, none is left."""
        try:
            for rank in self._ranks:
                rank.stdin.write(f"{jobs}\n".encode())
                rank.stdin.flush()
            waiting, deadline = set(self._answers), time.monotonic() + 280
            while waiting:
                ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
                assert ready and all(os.read(one, 1) for one in ready), "a rank died or hangs: see its log"
                waiting.difference_update(ready)
        except BaseException:
            self._kept.pop(len(self._ranks), None)
            self.end()
            raise

    def end(self) -> None:
        """Leaves no process."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()


def live_together(lives: Sequence[Life], world: int = 2) -> None:
    """Lives in a row on ranks that all tests share: where the command is not what is tested."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder) / "jobs.json"
        faults = ("overrides", "nan_gradients", "reads_otherwise")
        settings = [{"config": str(life.stage.config), **{fault: getattr(life, fault) for fault in faults}} for life in lives]
        jobs.write_text(json.dumps(settings))
        WarmRanks.of(world).live(jobs)

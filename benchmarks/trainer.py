"""What the trainer costs beyond the training: `python benchmarks/trainer.py [--quick] [--scale 4] [--parts mid demo stall]`.

Invariant: it is the trainer itself that runs, `train.loop.train` with its metrics, trackers and checkpoints on one rank; only its loader
is spied on, which times what happens between two steps. The bare contestant does forward, backward, clipping and AdamW on the same batch
right after it, on a copy of the model. Reading data is neither's (benchmarks/loader.py). The last line is JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml

from data_pipeline.cli import main as xc_data
from data_pipeline.loader import Loader, StepData
from train import configure, loop, optim
from train.build import build_model
from train.checkpoint import TrainState, Writer
from train.config import Config
from train.device import choose
from train.extensions import prepare_deepspeed
from train.launch import free_port, rank_environment
from train.objective import scaled_loss
from train.ranks import Ranks, join
from train.run_dir import RunDir
from train.tracking.terminal import Terminal
from train.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("mid", "demo", "stall")
ASKED = {"mid": "overhead_mid", "demo": "overhead_demo_ms", "stall": "checkpoint_stall_share"}
AROUND = 20
"""Steps around a save whose time counts."""
MID_TOKENS = 6810
"""Of a step: as many as the samples of benchmarks/step.py have, at every scale, since what the trainer adds grows with weights alone."""

Rounds = dict[str, list[float]]
"""What each figure was in each round."""
Visit = Callable[[StepData], Iterator[StepData]]
"""Hands a step to the trainer and gets the word back when the trainer asks for the next one."""


@dataclass
class Stall:
    """Wall time of blocks of steps: without a save, with one in the background, with one that the step waits for."""

    run: RunDir
    steps: int
    took: Rounds = field(default_factory=lambda: {"no save": [], "in the background": [], "synchronous": []})
    kind: str = "no save"
    writer: Any = None
    done: int = 0
    began: float = 0.0

    def visit(self, step: StepData) -> Iterator[StepData]:
        """Asks for a save near the beginning of a block, so that its background lies within the block; else waits for it at the end."""
        if self.done == 0:
            self.kind = list(self.took)[sum(map(len, self.took.values())) % 3]
            self.began = time.perf_counter()
        if self.done == 2 and self.kind != "no save":
            self.run.save_file.touch()
        yield step
        self.done += 1
        if self.done == self.steps:
            self.writer.wait()
            self.took[self.kind].append(time.perf_counter() - self.began)
            self.done = 0

    def writer_of(self, *arguments: Any) -> Writer:
        """The trainer's own writer, which saves synchronously where the block asks for that."""
        stall = self

        class Waiting(Writer):
            def save(self, state: TrainState) -> None:
                super().save(state)
                if stall.kind == "synchronous":
                    self.wait()

        self.writer = Waiting(*arguments)
        return self.writer


def settings(folder: Path, name: str, part: str, scale: int, quick: bool, steps: int) -> Config:
    """The demo's data and recipe; its model, or the middle one of benchmarks/step.py. Everything trains."""
    content: dict[str, Any] = {
        "base": str(ROOT / "configs/demo/base.yaml"),
        "run": {"name": name, "dir": str(folder / name), "stage": "sft"},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "sources": {source: {"path": str(folder / source)} for source in ("pairs", "documents")},
            "unit": "samples",
            "global_batch": 2,
        },
        "train": {"steps": steps, "groups": [{"match": ".*"}], "precision": "fp32"},
        "checkpoint": {"every": 10**9, "keep_last": 1},
        "evaluate": {"splits": {}, "text": None},
        "track": {"every": 2 if quick else 10},
    }
    if part != "demo" and not quick:
        decoder = {"vocab": 32000 // scale, "hidden": 1024, "layers": 8 // scale, "heads": 16, "kv_heads": 8, "ffn": 4096}
        content["model"] = {"decoder": decoder}
        content["data"] |= {"context": 256, "window": 400, "global_batch": 1, "micro_packs": 1}
        content["track"] = {"every": 5}
    if part == "mid" and not quick:
        content["data"] |= {"context": MID_TOKENS, "window": 4000, "images_per_pack": 1024, "segments_per_pack": 1024}
        content["track"] = {"every": 2}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return configure.load(folder / f"{name}.yaml")


def train(config: Config, ranks: Ranks, visit: Visit, writer: Callable[..., Writer] = Writer) -> None:
    """A life of the trainer whose loader goes through `visit`."""

    class Spied(Loader):
        def __iter__(self) -> Iterator[StepData]:
            for step in super().__iter__():
                yield from visit(step)

    run = RunDir(config.run.dir)
    run.create()
    watchdog = Watchdog(config.watchdog, run, 0, 1)
    patches = mock.patch.object(loop, "Loader", Spied), mock.patch.object(loop.checkpoint, "Writer", writer)
    with patches[0], patches[1], Path(os.devnull).open("w") as nobody:
        loop.train(config, run, ranks, choose(config.train.precision, 0), Terminal(config.run.name, nobody), watchdog)
    watchdog.close()


def bare_step(config: Config) -> Callable[[StepData], None]:
    """Forward, backward, clipping and AdamW of a step, and nothing else."""
    built = build_model(config, choose(config.train.precision, 0))
    model, optimizer = built.model.train(), optim.adamw(built.trained, built.model, config.train)
    optim.set_lr(optimizer, config.train.lr)

    def run(step: StepData) -> None:
        for micro_batch in step.micro_batches:
            scaled_loss(model(micro_batch.batch).loss_sum, 1, step.supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return run


def overhead(folder: Path, ranks: Ranks, part: str, scale: int, quick: bool, rounds: int) -> Rounds:
    """A step of the trainer against the bare one, in processor time of all threads, summed over the steps between two flushes."""
    config = settings(folder, part, part, scale, quick, 10**6)
    each = config.track.every
    measured = each * (rounds + 1)
    config.train.steps = measured + 1  # a step's time ends where the trainer asks for the next
    bare = bare_step(config)
    ours, theirs = [], []

    def visit(step: StepData) -> Iterator[StepData]:
        began = time.process_time()
        yield step
        middle = time.process_time()
        bare(step)
        ours.append(middle - began)
        theirs.append(time.process_time() - middle)

    train(config, ranks, visit)
    if len(ours) < measured:
        sys.exit(f"the trainer was stopped after {len(ours)} of {measured} steps")
    # The first steps warm up. The flush of a round's last step is the trainer's own part of that step.
    blocks = [(sum(ours[i : i + each]), sum(theirs[i : i + each])) for i in range(each, each * (rounds + 1), each)]
    found: Rounds = {"overhead_mid": [a / b for a, b in blocks]} if part == "mid" else {}
    found[f"overhead_{part}_ms" if part == "demo" else f"{part}: ms more a step"] = [1000 * (a - b) / each for a, b in blocks]
    return {**found, f"{part}: ms of a bare step": [1000 * b / each for _, b in blocks]}


def stall(folder: Path, ranks: Ranks, scale: int, quick: bool, rounds: int) -> Rounds:
    """Wall time that a save in the background adds to the steps around it, by what a synchronous one adds; from the second save on."""
    around = 4 if quick else AROUND
    config = settings(folder, "stall", "stall", scale, quick, 3 * around * (rounds + 1) + 1)
    blocks = Stall(RunDir(config.run.dir), around)
    train(config, ranks, blocks.visit, blocks.writer_of)
    if len(blocks.took["synchronous"]) <= rounds:
        sys.exit("the trainer was stopped before its last step")
    plain, background, synchronous = (values[1:] for values in blocks.took.values())
    extra = [[a - b for a, b in zip(values, plain, strict=True)] for values in (background, synchronous)]
    size = sum(f.stat().st_size for f in RunDir(config.run.dir).checkpoints.rglob("*") if f.is_file())
    return {
        "checkpoint_stall_share": [a / b for a, b in zip(*extra, strict=True)],
        f"stall: s of {around} steps without a save": plain,
        "stall: s more with one in the background": extra[0],
        "stall: s more with a synchronous one": extra[1],
        "stall: MB of a checkpoint": [size / 1e6],
    }


def prepare(folder: Path) -> None:
    """The demo's pictures and documents, indexed."""
    demo = ROOT / "examples/demo"
    shutil.copytree(demo / "tokenizer", folder / "tokenizer")
    for source in ("pairs", "documents"):
        (folder / source).mkdir()
        for tar in (demo / source).glob("*.tar"):
            shutil.copy(tar, folder / source)
        for command in (["index", str(folder / source), "--tokenizer", str(folder / "tokenizer")], ["merge", str(folder / source)]):
            with suppress(SystemExit), redirect_stdout(sys.stderr):
                xc_data(command)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="The trainer against the bare training step, and what a checkpoint costs the step.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--scale", type=int, default=1, choices=(1, 2, 4), help="so many times fewer layers and words of the middle model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="the demo's model and few steps: shows that it runs, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ.update({**rank_environment(0, 1, free_port()), "WANDB_MODE": "offline"})
    rounds: Rounds = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        ranks = join("gloo")
        for part in args.parts:
            measure = (folder, ranks, args.scale, args.quick, args.rounds)
            rounds |= stall(*measure) if part == "stall" else overhead(folder, ranks, part, *measure[2:])
        dist.destroy_process_group()
    print(f"{'':48} {'median':>9} {'least':>9} {'most':>9}")
    for name, values in rounds.items():
        print(f"{name:48} {statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}")
    figures = {name: round(statistics.median(rounds[name]), 3) if name in rounds else None for name in ASKED.values()}
    spread = {name: [round(min(rounds[name]), 3), round(max(rounds[name]), 3)] for name in ASKED.values() if name in rounds}
    machine = {"cores": os.cpu_count(), "threads": 1, "scale": args.scale, "load": round(os.getloadavg()[0], 1)}
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed", "wandb")}, **machine}
    print(json.dumps({"name": "trainer", "figures": {**figures, "spread": spread}, "versions": versions}))


if __name__ == "__main__":
    main()

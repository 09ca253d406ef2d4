"""The training loop: the one orchestrator. Read `train` top to bottom to learn how a stage is trained.

Invariant: whatever decides the course of the run (counts, stops, dropped samples) is agreed on by all ranks before it is used, and the
state that is saved is that of the last step that moved the weights.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from data_pipeline.errors import EXIT_DONE, EXIT_TRY_AGAIN
from data_pipeline.loader import Loader, StepData, open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.ledger import Ledger, copy_index_damage
from train import checkpoint, configure, optim
from train.checkpoint import TrainState
from train.config import Config
from train.device import Device
from train.engine import Engine
from train.flops import cost_model
from train.meter import Meter
from train.model.xcomposer2 import XComposer2
from train.objective import losses_by_source
from train.ranks import Ranks
from train.run_dir import RunDir, write_atomic
from train.signals import StopRequest
from train.tracking.terminal import Terminal
from train.tracking.trackers import Trackers
from train.weights import final

COUNTED = ("supervised", "tokens", "image_tokens", "images", "dropped", "stop")
"""What ranks sum before each step."""


@dataclass(frozen=True)
class Ending:
    """How a life ended."""

    code: int
    reason: str
    step: int


def build_model(config: Config, device: Device) -> XComposer2:
    """The model with the stage's starting weights, on the device and in its number format."""
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    model.init_weights(config.run.seed)
    if config.run.init_from:
        final.load_into(model, config.run.init_from)
    return model.to(device.torch_device, device.dtype)


def train(config: Config, run: RunDir, ranks: Ranks, device: Device, terminal: Terminal) -> Ending:
    """One life of a stage: from the newest checkpoint, or the start, to the end or a stop request."""
    stop = StopRequest(run)
    torch.manual_seed(config.run.seed * 1_000_003 + ranks.rank)
    torch.use_deterministic_algorithms(config.run.deterministic)

    data = open_data(config.data, config.run.seed)
    model = build_model(config, device)
    trained, frozen = optim.resolve(model, config.train)
    costs = cost_model(config)
    micro_steps = -(-config.data.global_batch // (ranks.world * config.data.micro_packs))
    engine = Engine(config, model, optim.adamw(trained, config.train), ranks, micro_steps, device.dtype)

    base_digest = final.digest(config.run.init_from) if config.run.init_from else None
    start = TrainState(
        step=0,
        cursor=(0, 0),
        progress=0.0,
        totals={},
        plan_digest=data.plan.digest,
        base_digest=base_digest,
        world=ranks.world,
        zero_stage=config.deepspeed.stage,
        dtype=str(device.dtype),
    )
    folder, state = checkpoint.find(run)
    if folder is None:
        state = start
    else:
        checkpoint.require_same(state, start, folder)
        checkpoint.load(folder, engine, ranks)

    ledger = Ledger(run.path, ranks.rank)
    meter = Meter(list(config.data.sources))
    trackers = None
    if ranks.rank == 0:
        life = run.begin_life(state.step if folder else None, ranks.world)
        if folder is None:
            copy_index_damage(run.path, {s.name: s.damaged for s in data.sources})
        write_atomic(run.config, configure.to_yaml(config).encode())
        trackers = Trackers(run, config, configure.as_dict(config), life, state.step)
        terminal.say(optim.table(trained, frozen, config.train.lr))
        begins = f"resumed from step {state.step}" if folder else "started"
        terminal.say(f"{config.run.name}: {begins}, {ranks.world} ranks, ZeRO-{config.deepspeed.stage}, {device.dtype} ({device.reason})")

    pin = device.torch_device.type == "cuda"
    loader = Loader(config.data, data, config.run.seed, costs, ranks.rank, ranks.world, state.next_cursor, state.step, pin)
    totals = Counter(state.totals)
    ending = Ending(EXIT_DONE, "done", state.step)
    asked = time.monotonic()

    for step_data in loader:
        if config.train.steps is not None and state.step >= config.train.steps:
            break
        got = time.monotonic()
        totals_of_step = dict(zip(COUNTED, ranks.agree(_counts(step_data, stop)), strict=True))
        if totals_of_step.pop("stop"):
            ending = Ending(EXIT_TRY_AGAIN, f"stopped on request ({stop.reason() or 'of another rank'}); the same command goes on", state.step)
            break

        skipped_before = engine.skipped_steps
        by_source = []
        for micro_batch in step_data.micro_batches:
            batch = micro_batch.batch.to(device.torch_device)
            losses = engine.forward_backward(batch, totals_of_step["supervised"])
            by_source.append(losses_by_source(losses.per_target_L, batch, len(data.sources)))
        progress = _progress(config, step_data)
        lr = optim.learning_rate(config.train, (state.progress + progress) / 2)
        engine.step(lr)

        ledger.write(step_data.step, step_data.bad)
        totals.update(totals_of_step)
        totals["skipped"] += engine.skipped_steps - skipped_before
        state = TrainState(
            **{**vars(start), "step": step_data.step + 1, "cursor": _pair(step_data.cursor), "progress": progress, "totals": dict(totals)}
        )
        done = time.monotonic()
        meter.add(
            state.step,
            by_source,
            {
                "optim/lr": lr,
                "optim/grad_norm": engine.grad_norm(),
                "progress": progress,
                "throughput/tokens_per_s": totals_of_step["tokens"] / (done - asked),
                "throughput/step_s": done - asked,
                "throughput/data_wait_share": (got - asked) / (done - asked),
                "data/tokens": totals["tokens"],
                "data/supervised_tokens": totals["supervised"],
                "data/images": totals["images"],
                "health/skipped_steps": totals["skipped"],
                "health/bad_samples": totals["dropped"],
            },
        )
        saves = state.step % config.checkpoint.every == 0
        if saves or state.step % config.track.every == 0:
            _report(meter, trackers, terminal, run)
        if saves:
            _save(run, engine, ranks, state, config)
        asked = time.monotonic()

    _report(meter, trackers, terminal, run)
    if state.step and not (run.checkpoints / f"{checkpoint.PREFIX}{state.step:08d}").exists():
        _save(run, engine, ranks, state, config)
    if ending.code == EXIT_DONE:
        weights = engine.weights(keep=ranks.rank == 0)
        if ranks.rank == 0:
            final.write(run, weights, state.step)
    if trackers is not None:
        trackers.close()
    terminal.close()
    return Ending(ending.code, ending.reason, state.step)


def _counts(step: StepData, stop: StopRequest) -> list[int]:
    """This rank's part of `COUNTED`; padding is not counted as tokens."""
    batches = [m.batch for m in step.micro_batches]
    return [
        step.supervised,
        sum(sum(b.segment_lengths[:-1]) for b in batches),
        sum(len(b.image_index) for b in batches if b.image_count),
        sum(b.image_count for b in batches),
        len(step.bad),
        int(stop.reason() is not None),
    ]


def _progress(config: Config, step: StepData) -> float:
    """Share of the run that is done after this step."""
    if config.train.steps is not None:
        return (step.step + 1) / config.train.steps
    return step.progress or 0.0


def _pair(cursor: Cursor) -> tuple[int, int]:
    return cursor.window, cursor.pack


def _report(meter: Meter, trackers: Trackers | None, terminal: Terminal, run: RunDir) -> None:
    lines = meter.flush()
    if trackers is None or not lines:
        return
    for step, metrics in lines:
        trackers.log(step, metrics)
    step, metrics = lines[-1]
    speed = sum(m["throughput/tokens_per_s"] for _, m in lines) / len(lines)
    terminal.show(
        step, metrics["progress"], metrics["loss/train"], speed, int(metrics["health/skipped_steps"]), int(metrics["health/bad_samples"])
    )
    run.beat(step, "train")


def _save(run: RunDir, engine: Engine, ranks: Ranks, state: TrainState, config: Config) -> None:
    if ranks.rank == 0:
        run.beat(state.step, "checkpoint")
    checkpoint.save(run, engine, ranks, state, config.checkpoint.keep_last)

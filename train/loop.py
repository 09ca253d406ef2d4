"""The training loop: the one orchestrator. Read `train` top to bottom to learn how a stage is trained.

Invariant: whatever decides the course of the run (counts, stops, dropped samples) is agreed on by all ranks before it is used, and the
state that is saved is that of the last step that was done.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.config import Change, as_plain
from data_pipeline.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN, TryAgainError
from data_pipeline.loader import Loader, StepData
from data_pipeline.opened import Data, open_data
from data_pipeline.part import fingerprint, part_of
from data_pipeline.plan.origin import Cursor, Origin
from data_pipeline.read import budget
from data_pipeline.read.killers import Killers, read_killers
from data_pipeline.read.ledger import Ledger, copy_index_damage
from data_pipeline.samples import Kind
from train import checkpoint, configure, intact, optim, reshape
from train.build import build_model
from train.checkpoint import TrainState
from train.config import Config, GuardThen
from train.device import Device
from train.engine import Engine
from train.flops import Shape, cost_model, peak_flops
from train.guard import Guard
from train.objective import losses_by_source
from train.profiling import Profiling
from train.ranks import Ranks, SequenceGroup
from train.rehearsal import heaviest_batch, rehearse
from train.rollback import WENT_BACK_TO, roll_back
from train.run_dir import RunDir
from train.signals import SaveRequest, StopRequest
from train.tracking.figures import Figures
from train.tracking.meter import Own
from train.tracking.reporter import Reporter
from train.tracking.stopwatch import Stopwatch
from train.tracking.terminal import Terminal
from train.validate import Validation
from train.watchdog import Watchdog
from train.weights import final, initial


@dataclass(frozen=True)
class Ending:
    """How a life ended."""

    code: int
    reason: str
    step: int
    again: bool = False
    """Another life is to go on at once."""


class Counts(NamedTuple):
    """What ranks sum before each step. Padding does not count as tokens."""

    supervised: int
    tokens: int
    image_tokens: int
    images: int
    dropped: int
    stop: int
    save: int

    @staticmethod
    def of(step: StepData, stop: StopRequest, save: SaveRequest) -> "Counts":
        """The part of one rank."""
        batches = [m.batch for m in step.micro_batches]
        return Counts(
            supervised=step.supervised,
            tokens=sum(sum(b.segment_lengths[:-1]) for b in batches),
            image_tokens=sum(len(b.image_index) for b in batches if b.image_count),
            images=sum(b.image_count for b in batches),
            dropped=len(step.bad),
            stop=int(stop.reason() is not None),
            save=int(save.made()),
        )


def train(config: Config, run: RunDir, ranks: Ranks, device: Device, terminal: Terminal, watchdog: Watchdog) -> Ending:
    """One life of a stage: from the newest checkpoint, or the start, to the end or a stop request."""
    torch.manual_seed(config.run.seed * 1_000_003 + ranks.rank)
    torch.use_deterministic_algorithms(config.run.deterministic)

    group = SequenceGroup.join(ranks.rank, configure.data_parallel(config, ranks.world), config.parallel.sequence)
    folder = intact.find(run, ranks, terminal.say)
    data, saved, change = _open_data(config, checkpoint.read_state(folder) if folder else None)
    built = build_model(config, device, ranks)
    ranks.barrier()  # with our patience: a collective of DeepSpeed's has NCCL's, ten minutes, also for a node that reads weights slowly
    built.model.share_tokens(group.group)
    reshaped = saved is not None and saved.world != ranks.world and not reshape.is_whole(saved.zero_stage, saved.dtype)
    engine = Engine(config, built.model, optim.adamw(built.trained, built.model, config.train), ranks, device.dtype, universal=reshaped)
    state, resumed = _resume(config, run, ranks, device, data, engine, folder, saved, lambda: watchdog.beat(0, "start"))
    ranks.barrier()  # or the checkpoint
    reporter = Reporter(config, run, ranks, terminal, peak_flops(device.name) if device.dtype is torch.bfloat16 else None)
    figures = Figures(config, data, optim.highest_scales(built.trained), _lived_s(run, ranks, watchdog.began))
    if ranks.rank == 0:
        begins = f"resumed from step {state.step}" if resumed else "started"
        engine_of = f"ZeRO-{config.deepspeed.stage}, {device.dtype} ({device.reason}), attention by {built.attention}"
        about = f"{config.run.name}: {begins}, {ranks.world} ranks, {engine_of}"
        life = run.begin_life(
            began=watchdog.began,
            resumed_from=state.step if resumed else None,
            world=ranks.world,
            sequence=group.size,
            device=device.torch_device.type,
            plan=data.plan.digest,
            origin=asdict(data.plan.origin),
            cost=asdict(cost_model(config)),
            went_back_to=state.guard.get(WENT_BACK_TO),
        )
        reporter.begin(life, state.step, as_plain(config), [optim.table(built.trained, built.frozen, config.train.lr), about, *change])

    with_images = any(source.kind is not Kind.text for source in data.sources)
    heaviest = part_of(heaviest_batch(config.data, with_images), group.rank, group.size, config.data.images.tokens)
    rehearse(engine, heaviest, device.torch_device)

    stop, save = StopRequest(run, ranks.rank), SaveRequest(run, ranks.rank)  # until here, a request ended the process at once
    loader = Loader(
        config.data,
        data,
        config.run.seed,
        cost_model(config),
        group.number,
        group.groups,
        state.next_cursor,
        state.step,
        pin=device.torch_device.type == "cuda",
        killers=Killers(run.path, ranks.rank, ranks.share(read_killers(run.path) if ranks.rank == 0 else None)),
    )
    ledger = Ledger(run.path, ranks.rank)
    budgets = {name: source.errors for name, source in config.data.sources.items()}
    guard = Guard(config.guard, run.path, ranks.rank, device.torch_device, state.guard)
    writer = checkpoint.Writer(run, engine, ranks, config.checkpoint)
    validation = Validation(config, run, data.tokenizer, engine, ranks, device)
    validation.begin(state.step)
    profiling = Profiling(config.profile, run.path, ranks.rank)
    saved_step = state.step if resumed else None
    ending = Ending(EXIT_DONE, "done", state.step)
    stopwatch, asked = Stopwatch(device.torch_device), time.monotonic()
    watchdog.beat(state.step, "data")
    for step in () if _is_done(config, state) else loader:
        over = budget.overdrawn(state.totals, budgets)
        if over:
            cure = f"see xc-data ledger {run.path}; raise that to go on, or leave those samples out of a new run"
            ending = Ending(EXIT_NEEDS_PERSON, f"{config.run.name}: stopped after step {state.step}: {over} ({cure})", state.step)
            break
        got = time.monotonic()
        counted = step if group.rank == 0 else replace(step, micro_batches=[])  # the packs of a sequence group count once
        own = Counts.of(counted, stop, save)
        doubt = group.doubt(fingerprint(m.batch for m in step.micro_batches))
        doubt, *agreed = ranks.agree([doubt, *own, *budget.charges(counted, list(budgets))])
        if doubt:  # one rank could not read what another could: their parts would not fit together
            raise TryAgainError(
                f"{config.run.name}: ranks that share packs read step {state.step + 1} differently; the same command goes on"
            )
        counts, charges = Counts(*agreed[: len(Counts._fields)]), agreed[len(Counts._fields) :]
        if counts.stop:
            why = stop.reason() or "another rank was asked"
            ending = Ending(
                EXIT_TRY_AGAIN, f"{config.run.name}: stopped after step {state.step} ({why}); the same command goes on", state.step
            )
            break

        began = state.cursor
        parts = [part_of(batch, group.rank, group.size, config.data.images.tokens) for batch in guard.judged_last(step)]
        watchdog.beat(state.step, "forward")
        profiling.before(state.step + 1)
        stopwatch.lap("data")
        by_source, loss_sums = [], []
        for part in parts:
            last = part is parts[-1]
            batch = part.to(device.torch_device)
            losses = engine.forward(batch)
            loss_sums.append(losses.loss_sum.detach())
            stopwatch.lap("forward")
            engine.backward(losses.loss_sum, counts.supervised, last, guard.factor(loss_sums, counts.supervised) if last else None)
            by_source.append(losses_by_source(losses.per_target_L, batch, len(data.sources)))
            stopwatch.lap("backward")
        progress = _progress(config, step)
        lr = optim.learning_rate(config.train, (state.progress + progress) / 2, state.step + 0.5)
        skipped = engine.step(lr)
        stopwatch.lap("optimizer")
        profiling.after(state.step + 1)

        grad_norm = engine.grad_norm()
        guard.after(step, began, bool(skipped), grad_norm, data.sources)
        ledger.write(step.step, counted.bad)
        totals = Counter(budget.charged(state.totals, budgets, charges))
        seconds = time.monotonic() - asked
        totals.update({**counts._asdict(), "skipped": skipped, "step_ms": 0 if skipped else round(seconds * 1000)})
        state = replace(state, step=step.step + 1, cursor=(step.cursor.window, step.cursor.pack), progress=progress, totals=dict(totals))
        state = replace(state, drawn=data.plan.drawn(step.cursor))
        host = figures.of_step(counts, state, seconds, got - asked, lr, grad_norm, began)
        if validation.due(state.step):
            watchdog.beat(state.step, "checkpoint")
            host |= validation.measure()
            reporter.show(state.step, validation.captions())
        model_flops = sum(built.cost.total(Shape.useful(m.batch)).model for m in step.micro_batches) // group.size
        hardware_flops = sum(built.cost.total(Shape.of(part)).hardware for part in parts)
        image_tokens = sum(len(part.image_index) for part in parts if part.image_count)
        reporter.add(state.step, by_source, host, Own(stopwatch.laps(), image_tokens, device.most_memory(), model_flops, hardware_flops))
        saves = counts.save > 0 or state.step % config.checkpoint.every == 0
        if saves or state.step % config.track.every == 0:
            reporter.flush()
        if saves:
            watchdog.beat(state.step, "checkpoint")
            writer.save(replace(state, guard=guard.state()))
            save.answered()
            saved_step = state.step
        if guard.exhausted():
            watchdog.beat(state.step, "checkpoint")
            reporter.flush()
            writer.wait()
            ending = _given_up(config, run, ranks, state, guard)
            saved_step = state.step if ending.again else saved_step
            break
        writer.check()
        watchdog.started()
        if _is_done(config, state):  # before another batch is asked for: it need not be there any more
            break
        asked = time.monotonic()
        stopwatch.start()
        watchdog.beat(state.step, "data")

    watchdog.beat(state.step, "checkpoint")
    profiling.close(state.step)
    reporter.flush()
    if state.step != saved_step:
        writer.save(replace(state, guard=guard.state()))
    writer.wait()
    if ending.code == EXIT_DONE:
        weights = engine.weights(keep=ranks.rank == 0)
        if ranks.rank == 0:
            final.write(run, weights, state.step)
    reporter.close()
    return replace(ending, step=state.step)


def _open_data(config: Config, saved: TrainState | None) -> tuple[Data, TrainState | None, list[str]]:
    """The data from where the run is, the state to go on from, and, where the mix changed, what that does to the data."""
    mix = config.data, config.run.seed, config.train.steps
    data = open_data(*mix, saved.origin if saved else None)
    if saved is None or saved.plan_digest == data.plan.digest or config.data.change is Change.refuse:
        return data, saved, []
    repeat = config.data.change is Change.repeat
    origin = saved.drawn.origin(saved.next_cursor, saved.step, repeat)
    said = saved.drawn.change(saved.next_cursor, repeat, {source.name: source.digest for source in data.sources})
    data = open_data(*mix, origin)
    saved = replace(saved, cursor=(origin.window, 0), origin=origin, plan_digest=data.plan.digest)
    return data, saved, [f"{config.run.name}: the mix changed after step {saved.step}: {said}"]


def _resume(
    config: Config,
    run: RunDir,
    ranks: Ranks,
    device: Device,
    data: Data,
    engine: Engine,
    folder: Path | None,
    saved: TrainState | None,
    alive: Callable[[], None],
) -> tuple[TrainState, bool]:
    """The state to go on from, and whether it is that of a checkpoint."""
    start = TrainState(
        step=0,
        cursor=(0, 0),
        drawn=data.plan.drawn(Cursor(0, 0)),
        origin=Origin(),
        progress=0.0,
        totals={},
        guard={},
        plan_digest=data.plan.digest,
        base_digest=initial.digest(config),
        world=ranks.world,
        zero_stage=config.deepspeed.stage,
        dtype=str(device.dtype),
    )
    if folder is None or saved is None:
        if ranks.rank == 0:
            copy_index_damage(run.path, {s.name: s.damaged for s in data.sources})
        return start, False
    checkpoint.require_same(saved, start, folder)
    checkpoint.load(folder, engine, ranks, saved, run, alive)
    return replace(saved, world=ranks.world, zero_stage=config.deepspeed.stage), True


def _given_up(config: Config, run: RunDir, ranks: Ranks, state: TrainState, guard: Guard) -> Ending:
    """Too many steps in a row moved nothing: the next life goes on with the weights of the last good checkpoint, or a person must look."""
    why = f"{guard.in_a_row} steps in a row moved nothing, guard.in_a_row is {config.guard.in_a_row}"
    if config.guard.then is GuardThen.rollback:
        found = roll_back(run, ranks, state, config.checkpoint)
        if isinstance(found, int):
            what = f"went back after step {state.step} to the weights of step {found}, on with the data behind it"
            return Ending(EXIT_TRY_AGAIN, f"{config.run.name}: {what}: {why} (see {run.path}/skipped)", state.step, again=True)
        why += f", and {found}"
    cure = f"see {run.path}/skipped; lower train.lr or mend the data in a new run, or run the same command to try again"
    return Ending(EXIT_NEEDS_PERSON, f"{config.run.name}: stopped after step {state.step}: {why} ({cure})", state.step)


def _is_done(config: Config, state: TrainState) -> bool:
    """Whether a run in steps has done them; one in data ends with its plan."""
    return config.train.steps is not None and state.step >= config.train.steps


def _lived_s(run: RunDir, ranks: Ranks, began: float) -> float:
    """Seconds of the lives until now, this one since `began` included; rank 0 alone tells it, and reads the metrics of a life for it."""
    return run.lived_s() + time.time() - began if ranks.rank == 0 else 0.0


def _progress(config: Config, step: StepData) -> float:
    """Share of the run that is done after this step."""
    if config.train.steps is not None:
        return (step.step + 1) / config.train.steps
    return step.progress or 0.0

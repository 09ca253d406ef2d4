"""`xc-train plan`: what a stage will cost, before anything is started: parameters, steps, FLOPs, memory, GPU-hours.

Invariant: the model is built on the meta device only, so a laptop can plan what needs a cluster; whatever is assumed is said.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.opened import Data, open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.samples import Kind
from train import configure, memory, optim
from train.config import Config, Precision
from train.flops import Flops, Shape, StepCost
from train.memory import Memory
from train.model.xcomposer2 import XComposer2
from train.rehearsal import heaviest_batch

GIB = 2**30
SAMPLED_STEPS = 4
"""Global batches of the data plan whose cost stands for all."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: int
    memory_gib: float
    """Memory of one GPU."""
    peak: float
    """Dense FLOP/s of one GPU in the run's number format."""
    mfu: float
    """Share of the peak that the model's FLOPs are expected to reach."""


@dataclass(frozen=True)
class Outlook:
    """The figures behind the page."""

    groups: str
    trained: int
    frozen: int
    steps: int | None
    packs: float
    """Packs of a step."""
    step: dict[str, Flops]
    """FLOPs of a step by part of the model, all ranks together."""
    memory: Memory
    assumed: str

    @property
    def step_model_flops(self) -> int:
        """Model FLOPs of a step."""
        return sum(f.model for f in self.step.values())

    def gpu_hours(self, machine: Machine) -> float | None:
        """Hours of one GPU for all steps."""
        return self.steps * self.step_model_flops / (machine.peak * machine.mfu) / 3600 if self.steps else None


def look(config: Config, machine: Machine) -> Outlook:
    """Computes the figures.

    Raises:
        UserError: the config contradicts itself.
    """
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    trained, frozen = optim.resolve(model, config.train)
    cost = StepCost.of(model, config.train.checkpointing)
    try:
        data, why = open_data(config.data, config.run.seed, config.train.steps), ""
    except UserError as error:
        data, why = None, str(error)
    with_images = data is None or any(source.kind is not Kind.text for source in data.sources)
    heaviest = heaviest_batch(config.data, with_images)
    if data is None:
        packs = float(config.data.global_batch)
        step = {part: _times(f, packs / config.data.micro_packs) for part, f in cost.by_part(Shape.of(heaviest)).items()}
        assumed = f"every pack full, one segment each: the data cannot be read ({why})"
    else:
        step, packs = _planned_step(config, data, cost)
        assumed = f"the mean of the first {SAMPLED_STEPS} steps of the data plan, every word supervised"
    dtype = torch.float32 if config.train.precision is Precision.fp32 else torch.bfloat16
    return Outlook(
        groups=optim.table(trained, frozen, config.train.lr),
        trained=sum(g.count for g in trained),
        frozen=sum(g.count for g in frozen),
        steps=config.train.steps or (_planned_steps(config, data) if data else None),
        packs=packs,
        step=step,
        memory=memory.of_run(model, config, machine.gpus, dtype, heaviest),
        assumed=assumed,
    )


def page(config: Config, machine: Machine) -> str:
    """What `xc-train plan` prints."""
    found = look(config, machine)
    groups = configure.data_parallel(config, machine.gpus)
    micro_steps = -(-config.data.global_batch // (groups * config.data.micro_packs))
    shared = f", each pack on {config.parallel.sequence}" if config.parallel.sequence > 1 else ""
    hardware = sum(f.hardware for f in found.step.values())
    parts = ", ".join(f"{part} {f.model / found.step_model_flops:.0%}" for part, f in found.step.items())
    held = ", ".join(f"{f.name} {getattr(found.memory, f.name) / GIB:.2f}" for f in fields(found.memory) if getattr(found.memory, f.name))
    total = found.memory.device / GIB
    fits = "fits" if total <= machine.memory_gib else "does not fit"
    steps = f"{found.steps:,}" if found.steps else "unknown until the data is indexed"
    lines = [
        found.groups,
        "",
        f"parameters   {found.trained + found.frozen:,}: {found.trained:,} trained, {found.frozen:,} frozen",
        f"steps        {steps}, each {found.packs:.0f} packs in {micro_steps} micro-steps on {machine.gpus} GPUs{shared}",
        f"a step       {found.step_model_flops:.3g} model FLOPs, {hardware:.3g} with recomputation ({parts})",
        f"             {found.assumed}",
        f"memory       {total:.2f} GiB of {machine.memory_gib:g} a GPU, ZeRO-{config.deepspeed.stage}, "
        f"checkpointing {config.train.checkpointing.kind.value}: {fits}",
        f"             {held} GiB; the allocator and communication libraries take some GiB besides",
    ]
    hours = found.gpu_hours(machine)
    if hours is not None:
        days, peak = hours / machine.gpus / 24, machine.peak / 1e12
        speed = f"{machine.mfu:.0%} MFU of {peak:g} TFLOP/s"
        lines.append(f"time         {hours:,.1f} GPU-hours, {days:.2f} days on {machine.gpus} GPUs at {speed}")
    return "\n".join(lines)


def plan(config_path: str, overrides: list[str], machine: Machine) -> str:
    """The page of a config."""
    return page(configure.load(config_path, overrides), machine)


def _planned_step(config: Config, data: Data, cost: StepCost) -> tuple[dict[str, Flops], float]:
    """Mean cost of a step by part, and its mean number of packs."""
    total: dict[str, Flops] = {}
    cursor, steps, packs = Cursor(0, 0), 0, 0
    for _ in range(SAMPLED_STEPS):
        batch = data.plan.global_batch(cursor)
        steps, packs, cursor = steps + 1, packs + len(batch), batch.cursor
        tokens = batch.pieces.tokens.astype(np.int64) - ~batch.pieces.last  # a piece that does not end its sample has no end token
        image_tokens = data.plan.image_tokens(batch.pieces)
        micro_batches = batch.pack_starts[: -1 : config.data.micro_packs]
        words = np.add.reduceat(tokens - image_tokens, micro_batches)
        tiles = int(batch.pieces.images.sum())
        shape = Shape(tuple(tokens.tolist()), tiles, int(image_tokens.sum()), int(words.sum()))
        for part, flops in cost.by_part(shape, chunked=int(words[words > cost.chunk_rows].sum())).items():
            before = total.get(part, Flops(0, 0, 0))
            total[part] = Flops(*(a + b for a, b in zip(before, flops, strict=True)))
        if batch.done:
            break
    return {part: _times(flops, 1 / steps) for part, flops in total.items()}, packs / steps


def _planned_steps(config: Config, data: Data) -> int | None:
    """Steps of a run that is measured in epochs, from the packs of its first window."""
    if data.plan.windows is None:
        return None
    return -(-len(data.plan.window(0)) * data.plan.windows // config.data.global_batch)


def _times(flops: Flops, factor: float) -> Flops:
    return Flops(*(round(each * factor) for each in flops))

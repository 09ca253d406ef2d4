"""One of two ranks that count the bytes they hold under every ZeRO stage, train with and without a rehearsal of the heaviest batch,
and rehearse one that no memory holds, for test_memory.py: `memory_worker.py JOBS.pt OUT.json`.

Counted are all storages that appear with the engine and live between the backward pass and the step, the batch apart: weights,
gradients and, after a first step, the optimizer's state. Whoever holds them, nothing is asked of DeepSpeed.
"""

import gc
import hashlib
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from train_worker import build, optimizer_of

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from train.config import Config
from train.engine import Engine
from train.model_config import PLoRAConfig
from train.ranks import Ranks, join
from train.rehearsal import heaviest_batch, rehearse

CPU = torch.device("cpu")
COURSES = {"zero 0 fp32", "zero 1 fp32", "zero 1 bf16", "zero 2 fp32", "zero 3 fp32"}
"""Jobs that train: in bf16, DeepSpeed has an optimizer of its own for ZeRO-1 alone."""
ROOM = 256 << 20
"""Bytes that are left for the batch that does not fit."""


def storages() -> dict[int, torch.UntypedStorage]:
    """Every living storage by its address, which no other takes while this is held."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":  # isinstance would wake lazy objects
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes():
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


def engine_of(config: Config, dtype: torch.dtype, ranks: Ranks) -> Engine:
    """The model of a job with fresh weights, under AdamW."""
    model = build(config).to(dtype)
    return Engine(config, model, optimizer_of(model, "adamw"), ranks, dtype)


def add_gradient(engine: Engine, batch: PackedBatch) -> float:
    """A step's two micro-batches, both alike; the loss of the last."""
    for last in (False, True):
        loss_sum = engine.forward(batch).loss_sum
        engine.backward(loss_sum, 4 * batch.supervised, last)
    return float(loss_sum.detach())


def held(config: Config, dtype: torch.dtype, batch: PackedBatch, ranks: Ranks) -> dict[str, int | list[int]]:
    """Bytes of one rank; and how many new storages as large as the optimizer's moments are held in a rehearsal before the first step, which
    makes the moments, and in one after it.
    """
    before = storages()
    model = build(config).to(dtype)
    optimizer = optimizer_of(model, "adamw")
    engine = Engine(config, model, optimizer, ranks, dtype)
    added = [sizes_in_rehearsal(engine, batch)]
    add_gradient(engine, batch)
    engine.step(1e-3)
    add_gradient(engine, batch)
    size = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    engine.step(1e-3)
    added.append(sizes_in_rehearsal(engine, batch))
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    return {"bytes": size, "rooms": [sum(abs(size - moments) < moments / 50 for size in sizes) for sizes in added]}


def sizes_in_rehearsal(engine: Engine, batch: PackedBatch) -> list[int]:
    """Bytes of each storage that is there when a rehearsal begins its forward pass, and was not before."""
    before, during = storages(), dict[int, torch.UntypedStorage]()
    hook = engine.module.register_forward_pre_hook(lambda *_: during.update(storages()))
    engine.rehearse(batch)
    hook.remove()
    return [storage.nbytes() for address, storage in during.items() if address not in before]


def course(config: Config, dtype: torch.dtype, batch: PackedBatch, ranks: Ranks, rehearsed: bool) -> list[str | float]:
    """The losses of three steps with dropout, and a digest of the weights after them."""
    torch.manual_seed(ranks.rank)
    config = replace(config, model=replace(config.model, plora=PLoRAConfig(rank=4, dropout=0.5)))
    engine = engine_of(config, dtype, ranks)
    if rehearsed:
        rehearse(engine, heaviest_batch(config.data, with_images=True), CPU)
    losses = []
    for _ in range(3):
        losses.append(add_gradient(engine, batch))
        engine.step(1e-3)
    weights = engine.weights(keep=True)
    return [*losses, hashlib.sha256(b"".join(w.view(torch.uint8).numpy().tobytes() for w in weights.values())).hexdigest()]


def outgrown(config: Config, dtype: torch.dtype, batch: PackedBatch, ranks: Ranks) -> str:
    """What the user is told where the heaviest batch needs more than `ROOM`."""
    engine = engine_of(config, dtype, ranks)
    config.data.context = 1 << 16
    too_much = heaviest_batch(config.data, with_images=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, limits[1]))
    try:
        rehearse(engine, too_much, CPU)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return "it fitted"


def main() -> None:
    job_file, out_file = sys.argv[1:]
    ranks = join("gloo")
    jobs = torch.load(job_file, weights_only=False)
    results = {name: held(**job, ranks=ranks) for name, job in jobs.items()}
    for name in sorted(COURSES):
        job = jobs[name]
        results[name] |= {"plain": course(**job, ranks=ranks, rehearsed=False), "rehearsed": course(**job, ranks=ranks, rehearsed=True)}
    results["said"] = outgrown(**next(iter(jobs.values())), ranks=ranks)
    if ranks.rank == 0:
        Path(out_file).write_text(json.dumps(results))
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

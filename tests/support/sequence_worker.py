"""One of the ranks that run parts of batches through a tiny model: `sequence_worker.py JOBS.pt OUT.pt`, for test_sequence_parallel.py.

A job holds the batches of a step by sequence group; each group runs its own. What comes out: loss of the step, losses and counts by
source, gradients averaged over all ranks, as the engine does; and by rank the bytes that autograd keeps for the backward pass.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from batches import IMAGE_SIZE, IMAGE_TOKENS, tiny_config

from data_pipeline.batch import PackedBatch
from data_pipeline.part import part_of
from train.config import Checkpointing
from train.model import attention, vision
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRankMode
from train.objective import losses_by_source, scaled_loss
from train.ranks import SequenceGroup, from_environment

SOURCES = 6


def build(job: dict[str, Any]) -> XComposer2:
    """Eight query heads on four key heads; PLoRA's B as training would leave it; the base frozen, as in pretraining, if the job says so."""
    config = tiny_config()
    config.decoder.heads, config.decoder.kv_heads = 8, 4
    if job.get("wide"):
        config.decoder.hidden, config.decoder.ffn, config.decoder.layers = 96, 256, 4
    config.projector.marks = job.get("marks", False)
    config.plora.mode = LowRankMode(job.get("mode", "plora"))
    model = XComposer2(config, IMAGE_SIZE, IMAGE_TOKENS)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("plora_b"):
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        if job.get("frozen"):
            parameter.requires_grad_(not name.startswith(("decoder.", "head.")) or "plora" in name)
    model.apply_cost_settings(job.get("checkpointing", Checkpointing()))
    return model


def measure(model: XComposer2, batches: list[PackedBatch], world: int, n_global: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Adds the gradients of the batches; returns losses and counts by source, and the bytes kept for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    sums, counts = torch.zeros(SOURCES), torch.zeros(SOURCES, dtype=torch.int64)
    for batch in batches:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = model(batch)
        scaled_loss(losses.loss_sum, world, n_global).backward()
        for total, each in zip((sums, counts), losses_by_source(losses.per_target_L, batch, SOURCES), strict=True):
            total += each
    return sums, counts, sum(storage.nbytes() for storage in kept.values())


def gradients(model: XComposer2) -> dict[str, torch.Tensor]:
    """Of all trained parameters; each has one, or the engine would wait for it."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    job_file, out_file = sys.argv[1:]
    rank, world, _ = from_environment()
    dist.init_process_group("gloo")
    results = {}
    for name, job in torch.load(job_file, weights_only=False).items():
        attention.LONGEST_PLAIN = vision.LONGEST_PLAIN = job.get("longest_plain", 512)
        group = SequenceGroup.join(rank, len(job["groups"]), world // len(job["groups"]))
        model = build(job)
        model.share_tokens(group.group)
        n_global = sum(batch.supervised for batches in job["groups"] for batch in batches)
        parts = [part_of(batch, group.rank, group.size, IMAGE_TOKENS) for batch in job["groups"][group.number]]
        sums, counts, kept = measure(model, parts, world, n_global)
        found = gradients(model)
        for total in (sums, counts, *found.values()):
            dist.all_reduce(total)
        by_rank: list[Any] = [None] * world
        dist.all_gather_object(by_rank, {"kept": kept, "tiles": [len(part.images) for part in parts]})
        results[name] = {
            "sums": sums,
            "counts": counts,
            "gradients": {key: grad / world for key, grad in found.items()},
            "by_rank": by_rank,
        }
    if rank == 0:
        torch.save(results, out_file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""A training step against the ordinary way of doing it: `python benchmarks/step.py [--quick] [--scale 4] [--parts flat ...]`.

Invariant: contestants run forward and backward with the same weights on the same samples, in interleaved rounds of one process, and
are compared by the processor time of their round: what other programs do to the clock on the wall does not enter. Peak memory is that
of a fresh process a contestant. The last line is JSON; what was not measured is null there, and the reason is printed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ordinary import FACTORS, Ordinary, Sample
from torch import Tensor

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.processes import keep_freed_memory
from data_pipeline.text.templates import Rendered
from train.config import Checkpointing, Recompute
from train.device import cpu_has_bf16
from train.flops import Shape, StepCost
from train.model.xcomposer2 import XComposer2
from train.model_config import DecoderConfig, LowRankMode, ModelConfig, PLoRAConfig, ProjectorConfig, VisionConfig

Rounds = dict[str, list[float]]
"""What each figure was in each round."""
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("memory", "fp32", "bf16", "factors", "plora", "flat")
ASKED = ("speedup_bf16", "speedup_fp32", "memory_ratio", "gemm_share_fp32", "gemm_share_bf16", "plora_overhead", "flat_32k")
DOCUMENT = 512
"""Tokens of the short documents whose cost should stay flat."""


@dataclass(frozen=True)
class Size:
    """The model and the samples; what is compared is the decoder, so the ViT is small."""

    decoder: DecoderConfig
    rank: int
    image: int
    """Side of an image in pixels; patches of 16."""
    lengths: tuple[int, ...]
    """Tokens of each sample, its image included."""
    packs: tuple[int, int]
    """Packed tokens between which the cost a token should be flat."""

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return (self.image // 16) ** 2


def size_of(quick: bool, scale: int) -> Size:
    """The whole size; a `scale`-th of its layers, vocabulary and samples, whose parts weigh the same; or one that only shows that it runs.

    The samples come in pairs that leave as much padding as all of them do.
    """
    if quick:
        return Size(DecoderConfig(vocab=512, hidden=64, layers=2, heads=4, kv_heads=2, ffn=128), 8, 64, (40, 70), (1024, 2048))
    lengths = (300, 1400, 460, 1240, 620, 1090, 770, 930)
    decoder = DecoderConfig(vocab=32000 // scale, hidden=1024, layers=8 // scale, heads=16, kv_heads=8, ffn=4096)
    return Size(decoder, 64, 256, lengths[: max(2, 8 // scale)], (2048, 32768))


def model_of(size: Size, dtype: torch.dtype = torch.float32, mode: LowRankMode = LowRankMode.plora) -> XComposer2:
    """Everything trains."""
    vision = VisionConfig("vit_tiny_patch16_224", 16, overrides={"embed_dim": 192, "depth": 2, "num_heads": 3})
    plora = PLoRAConfig(mode=mode, rank=size.rank, alpha=float(size.rank), dropout=0.0)
    model = XComposer2(ModelConfig(vision, ProjectorConfig(merge=1), size.decoder, plora), size.image, size.image_tokens)
    model.init_weights(0)
    return model.to(dtype)


def samples_of(size: Size, lengths: tuple[int, ...]) -> list[Sample]:
    """An image, then words of which the second half is supervised."""
    chance, pixels = random.Random(0), torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        words = length - size.image_tokens
        ids = [0] * size.image_tokens + [chance.randrange(size.decoder.vocab) for _ in range(words)]
        image = torch.randint(0, 256, (3, size.image, size.image), dtype=torch.uint8, generator=pixels)
        samples.append(Sample(torch.tensor(ids), image, size.image_tokens, length - words // 2))
    return samples


def packed(size: Size, samples: list[Sample]) -> PackedBatch:
    """Our batch of the samples, by the assembly that training uses."""
    segments = []
    for sample in samples:
        supervised = np.arange(len(sample.ids)) >= sample.answer
        rendered = Rendered(ids=sample.ids.numpy(), supervised=supervised, image_positions=np.arange(size.image_tokens), images=(0,))
        segments.append(Segment(rendered, (sample.pixels.numpy(),), 0, 0))
    return assemble(segments, size.image, size.image_tokens, 0)


def timed(run: Callable[[], Tensor], model: XComposer2) -> tuple[float, float]:
    """Processor seconds of a forward and backward pass, all threads together, and its loss."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    loss = run()
    loss.backward()
    return time.process_time() - began, float(loss.detach())


def bare_products(model: XComposer2, batch: PackedBatch, dtype: torch.dtype) -> tuple[float, int]:
    """Processor seconds and FLOPs of the decoder's linears and the head as bare products, forward and both gradients, in its shapes."""
    weights = [(len(batch.input_ids), m.weight) for m in model.decoder.modules() if hasattr(m, "plora_a")]
    spent, flops = 0.0, 0
    for rows, weight in [*weights, (len(batch.targets), model.head.weight)]:
        x, gradient, weight = torch.randn(rows, weight.shape[1]).to(dtype), torch.randn(rows, weight.shape[0]).to(dtype), weight.detach()
        began = time.process_time()
        _ = x @ weight.T, gradient @ weight, gradient.T @ x
        spent += time.process_time() - began
        flops += 3 * 2 * rows * weight.numel()
    return spent, flops


def round_of(runs: dict[str, Callable[[], Tensor]], model: XComposer2, found: Rounds, prefix: str) -> dict[str, float]:
    """Runs the contestants in turn; ends everything where their losses differ by more than rounding."""
    took, losses = {}, {}
    for who, run in runs.items():
        took[who], losses[who] = timed(run, model)
        print(f"{prefix}: {who} {took[who]:.2f} s", file=sys.stderr, flush=True)  # a long run that is cut short still said something
        found.setdefault(f"{prefix}: seconds of {who}", []).append(took[who])
    if max(losses.values()) - min(losses.values()) > 0.02 * abs(max(losses.values())):
        sys.exit(f"the contestants disagree about the loss: {losses}")
    return took


def compare(size: Size, name: str, rounds: int) -> Rounds:
    """Ours, the ordinary way, and bare products, in one number format."""
    dtype = FORMATS[name]
    model, samples = model_of(size, dtype), samples_of(size, size.lengths)
    batch = packed(size, samples)
    runs: dict[str, Callable[[], Tensor]] = {"ours": lambda: model(batch).loss_sum, "ordinary": Ordinary(model, samples)}
    found: Rounds = {}
    best_rate = 0.0
    for _ in range(rounds):
        took = round_of(runs, model, found, name)
        took["bare products"], flops = bare_products(model, batch, dtype)
        best_rate = max(best_rate, flops / took["bare products"])
        found.setdefault(f"{name}: seconds of bare products", []).append(took["bare products"])
        found.setdefault(f"speedup_{name}", []).append(took["ordinary"] / took["ours"])
    products = sum(f.model for part, f in StepCost.of(model, Checkpointing()).by_part(Shape.of(batch)).items() if part != "attention")
    found[f"{name}: GFLOP/s of bare products, best round"] = [best_rate / 1e9]
    found[f"gemm_share_{name}"] = [products / each / best_rate for each in found[f"{name}: seconds of ours"]]
    return found


def factors(size: Size, rounds: int) -> Rounds:
    """What each factor of the ordinary way costs: its time by that without the factor."""
    model, samples = model_of(size), samples_of(size, size.lengths)
    runs = {"ordinary": Ordinary(model, samples)} | {f"all but its {f}": Ordinary(model, samples, frozenset({f})) for f in FACTORS}
    found: Rounds = {}
    for _ in range(rounds):
        took = round_of(runs, model, found, "factors")
        for f in FACTORS:
            found.setdefault(f"factor of its {f}", []).append(took["ordinary"] / took[f"all but its {f}"])
    return found


def plora_overhead(size: Size, rounds: int) -> Rounds:
    """PLoRA's share of the time of a step by its share of the FLOPs."""
    batch = packed(size, samples_of(size, size.lengths))
    models = [model_of(size, mode=mode) for mode in (LowRankMode.plora, LowRankMode.none)]
    flops = [StepCost.of(model, Checkpointing()).total(Shape.of(batch)).model for model in models]
    found: Rounds = {}
    for _ in range(rounds):
        with_plora, without = (timed(lambda m=model: m(batch).loss_sum, model)[0] for model in models)
        found.setdefault("plora: time with by time without", []).append(with_plora / without)
        found.setdefault("plora_overhead", []).append((with_plora - without) / without * flops[1] / (flops[0] - flops[1]))
    found["plora: FLOPs with by FLOPs without"] = [flops[0] / flops[1]]
    return found


def narrow_of(size: Size) -> tuple[XComposer2, Size]:
    """A model of a quarter of the width, checkpointed, for long packs; and its size."""
    d = size.decoder
    narrow = DecoderConfig(
        vocab=max(512, d.vocab // 4), hidden=d.hidden // 4, layers=2, heads=d.heads // 4, kv_heads=max(1, d.kv_heads // 4), ffn=d.ffn // 4
    )
    small = replace(size, decoder=narrow, rank=max(4, size.rank // 4))
    model = model_of(small)
    model.apply_cost_settings(Checkpointing(Recompute.full))
    return model, small


def flat_parts(size: Size) -> tuple[XComposer2, list[PackedBatch]]:
    """A narrow model, and packs of short documents: a short pack and a long one."""
    model, small = narrow_of(size)
    return model, [packed(small, samples_of(small, (DOCUMENT,) * (tokens // DOCUMENT))) for tokens in size.packs]


def flat(size: Size, rounds: int) -> Rounds:
    """Cost a token of a long pack by that of a short one. The short one runs as often as makes the same number of tokens."""
    keep_freed_memory()  # as ranks on a CPU do: else each tensor of a long pack is mapped anew, page by page, which costs a third more
    model, packs = flat_parts(size)
    again = size.packs[1] // size.packs[0]
    found: Rounds = {}
    for _ in range(rounds):
        short = sum(timed(lambda: model(packs[0]).loss_sum, model)[0] for _ in range(again))
        found.setdefault("flat_32k", []).append(timed(lambda: model(packs[1]).loss_sum, model)[0] / short)
    return found


def squares(size: Size, rounds: int) -> Rounds:
    """What one document of all tokens costs more than two halves, by twice what these cost more than four quarters.

    1 where a pack costs its tokens and the squares of its documents' lengths; more where something grows faster.
    """
    (model, small), tokens = narrow_of(size), size.packs[1] // 2
    packs = [packed(small, samples_of(small, (tokens // parts,) * parts)) for parts in (4, 2, 1)]
    found: Rounds = {}
    for _ in range(rounds):
        quarters, halves, whole = (timed(lambda: model(pack).loss_sum, model)[0] for pack in packs)  # noqa: B023  called at once
        found.setdefault("one document: growth by that of squares", []).append((whole - halves) / (2 * (halves - quarters)))
        found.setdefault("one document: time by that of quarters", []).append(whole / quarters)
    return found


def peak_bytes(size: Size, who: str) -> int:
    """Growth of this process's memory by one step, its gradients included, at its peak."""
    if who.startswith("pack"):
        model, packs = flat_parts(size)
        batch = packs[who == "pack, long"]
        run = lambda: model(batch).loss_sum  # noqa: E731
    else:
        model, samples = model_of(size), samples_of(size, size.lengths)
        batch = packed(size, samples)
        run = (lambda: model(batch).loss_sum) if who == "ours" else Ordinary(model, samples)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run().backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def memory_ratio(size: Size) -> Rounds:
    """Our peak by the ordinary way's, and the peak a token of a long pack by that of a short one, each in a process of its own."""
    peaks = {}
    for who in ("ours", "ordinary", "pack, short", "pack, long"):
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as fresh:  # torch has not computed yet: there are no threads to lose
            peaks[who] = fresh.submit(peak_bytes, size, who).result()
    found = {f"memory: MiB of {who}": [peak / 2**20] for who, peak in peaks.items()}
    a_token = [peaks[who] / tokens for who, tokens in zip(("pack, short", "pack, long"), size.packs, strict=True)]
    return {
        "memory_ratio": [peaks["ours"] / peaks["ordinary"]],
        "memory: a token of the long by the short": [a_token[1] / a_token[0]],
        **found,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="A training step against padded batches, boolean masks, full logits and a dense mask.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1: figures are of processor time)")
    parser.add_argument(
        "--scale", type=int, default=1, choices=(1, 2, 4, 8), help="so many times fewer layers, words and samples: a slow machine's turn"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure (default: all; bf16 where the processor has it)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = size_of(args.quick, args.scale)
    parts = args.parts or [part for part in PARTS if part != "bf16" or cpu_has_bf16() or args.quick]
    if not args.parts and "bf16" not in parts:
        print("bf16 was not measured: this processor has no bf16 products (--parts bf16 measures it all the same)")
    measure: dict[str, Callable[[], Rounds]] = {
        "memory": lambda: memory_ratio(size),
        **{name: lambda name=name: compare(size, name, args.rounds) for name in FORMATS},
        "factors": lambda: factors(size, args.rounds),
        "plora": lambda: plora_overhead(size, args.rounds),
        "flat": lambda: flat(size, args.rounds) | squares(size, args.rounds),
    }
    rounds: Rounds = {}
    print(f"{'':48} {'median':>9} {'least':>9} {'most':>9}")
    for part in sorted(parts, key=PARTS.index):
        found = measure[part]()
        for name, values in found.items():
            print(f"{name:48} {statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}", flush=True)
        rounds |= found
    figures = {name: round(statistics.median(rounds[name]), 3) if name in rounds else None for name in ASKED}
    spread = {name: [round(min(rounds[name]), 3), round(max(rounds[name]), 3)] for name in ASKED if name in rounds}
    machine = {
        "cores": os.cpu_count(),
        "threads": args.threads,
        "scale": args.scale,
        "bf16": cpu_has_bf16(),
        "load": round(os.getloadavg()[0], 1),
    }
    versions = {"python": platform.python_version(), "torch": version("torch"), "timm": version("timm"), **machine}
    print(json.dumps({"name": "step", "figures": {**figures, "spread": spread}, "versions": versions}))


if __name__ == "__main__":
    main()

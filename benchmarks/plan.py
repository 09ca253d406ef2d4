"""What planning costs and what it gives: fill, samples a CPU second, a billion samples, balance.

Invariant: sources are real columns on disk, read as a training run reads them; every figure is CPU time or a ratio of one run, with
its spread, and the last line is the JSON that other tools read.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_pipeline.errors import EXIT_USER
from data_pipeline.plan.balance import assign, cost
from data_pipeline.plan.columns import ELEMENT, Budgets, ImagePolicy
from data_pipeline.plan.origin import Cursor
from data_pipeline.plan.pack import pack
from data_pipeline.plan.plan import PLANNER_VERSION, Plan
from data_pipeline.plan.split import Pieces
from data_pipeline.shards.merge import BLOCK_SAMPLES, ROW, SOURCE_FILE, VERSION, SourceFacts
from data_pipeline.shards.source import ShardSource
from train.config import Config
from train.device import cpu_name
from train.flops import cost_model

GIB = 1 << 30
CONTEXT, IMAGE, OVERHEAD = 4096, 1225, 2
BUDGETS = Budgets(CONTEXT, images=64, segments=256)
BINDING = Budgets(CONTEXT, images=8, segments=16)
"""With images of 144 tokens, all three budgets bind."""
FAR_WINDOW = 60_000


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    samples: int
    """Of the large source."""
    shards: int
    mix_samples: int
    """Of the mix of captions and documents."""
    windows: int
    """Measured one after the other."""


WHOLE = Scale(10**9, 100_000, 4_000_000, 100)
QUICK = Scale(10**6, 100, 200_000, 2)

Draw = Callable[[np.random.RandomState, int], tuple[np.ndarray, np.ndarray]]
"""From a generator and a number of samples to their element counts and ELEMENT records."""


def main() -> int:
    """Runs all parts."""
    parser = argparse.ArgumentParser(
        description="What planning costs and what it gives. Needs about 60 GB of disk; ends with one JSON line."
    )
    parser.add_argument("--dir", type=Path, help="where the sources are written and kept for the next run; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="a thousandth of the size: shows that it runs, its times mean nothing")
    args = parser.parse_args()
    scale = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="plan-benchmark-") as temporary:
        folder = args.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        needed = scale.samples * (ROW.itemsize + 2 * ELEMENT.itemsize + 8) * 1.05
        made = folder / f"pairs-{scale.samples}"
        if not made.exists() and shutil.disk_usage(folder).free < needed:
            print(f"error: {folder} has no room for {needed / 1e9:.0f} GB (name another folder: --dir)", file=sys.stderr)
            return EXIT_USER
        figures = {}
        for part, sources in (
            (mix_figures, [captions(folder, scale), documents(folder, scale)]),
            (large_figures, [large(folder, scale)]),
        ):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # a process of its own: its memory is a figure
                figures |= fresh.submit(part, sources, scale).result()
    print(json.dumps({"name": "plan", "figures": figures, "versions": versions()}))
    return 0


def mix_figures(folders: list[Path], scale: Scale) -> dict[str, float]:
    """Fill, speed and balance on 70 % captions and 30 % documents of one to three images."""
    figures: dict[str, float] = {}
    for name, budgets, policy in (("samples_per_s", BUDGETS, IMAGE), ("samples_per_s_binding", BINDING, 144)):
        plan = open_plan(folders, ["0.7", "0.3"], budgets, policy, global_batch=256)
        plan.window(0)
        rates = [
            plan.phases[0].draws / cpu(lambda w=w, plan=plan: whole_window(plan, w, ranks=64)) for w in range(1, 1 + scale.windows // 2)
        ]
        figures[name] = tell(name, rates)

    plan = open_plan(folders, ["0.7", "0.3"], BUDGETS, IMAGE, global_batch=256)
    windows = [plan.window(w) for w in range(min(16, scale.windows))]
    together = Pieces.concatenate([window.pieces for window in windows])
    unbounded = int(pack(together.tokens, together.images, BUDGETS).max()) + 1
    figures["fill"] = tell("fill", [window.pieces.tokens.sum() / len(window) / CONTEXT for window in windows])
    figures["fill_vs_unbounded"] = tell("fill_vs_unbounded", [unbounded / sum(len(window) for window in windows)])

    for ranks in (8, 64):
        for packs, suffix in ((4, ""), (8, "_8_packs")):
            by_sum, in_step = np.array(list(balances(folders, ranks, packs, windows=2))).T
            figures[f"balance_{ranks}{suffix}"] = tell(f"balance_{ranks}{suffix}", by_sum)
            figures[f"balance_{ranks}{suffix}_lock_step"] = tell(f"balance_{ranks}{suffix}_lock_step", in_step)
    return figures


def large_figures(folders: list[Path], scale: Scale) -> dict[str, float]:
    """Time and memory of planning over the large source; a process of its own, so that memory is the planner's."""
    figures: dict[str, float] = {}
    last = max(2, scale.windows // 2)
    for name, start in (("first", 0), ("far", FAR_WINDOW)):
        opened = time.process_time()
        plan = open_plan(folders, ["1"], BUDGETS, IMAGE, global_batch=256)
        plan.window(start)
        figures[f"billion_{name}_window_cold_ms"] = tell(f"billion_{name}_window_cold_ms", [1e3 * (time.process_time() - opened)])
        warm = [1e3 * cpu(lambda w=w, plan=plan: plan.window(w)) for w in range(start + 1, start + 1 + last)]
        figures[f"billion_{name}_window_ms"] = tell(f"billion_{name}_window_ms", warm)
    figures["billion_window_ms"] = max(figures["billion_first_window_ms"], figures["billion_far_window_ms"])
    figures["billion_epoch_table_ms"] = tell("billion_epoch_table_ms", [1e3 * cpu(lambda: plan._orders[0]._table(99))])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures["billion_rss_gib"] = tell("billion_rss_gib", [int(status["VmRSS"].split()[0]) / (1 << 20)])
    figures["billion_rss_peak_gib"] = tell("billion_rss_peak_gib", [int(status["VmHWM"].split()[0]) / (1 << 20)])
    return figures


def open_plan(folders: list[Path], weights: list[str], budgets: Budgets, image_tokens: int, global_batch: int) -> Plan:
    """A plan over sources on disk, opened as a training run opens them."""
    sources = [ShardSource(folder.name, folder) for folder in folders]
    shares, overheads = [Fraction(weight) for weight in weights], [OVERHEAD] * len(sources)
    return Plan(sources, shares, "samples", budgets, ImagePolicy(image_tokens), overheads, 65_536, global_batch, seed=1)


def whole_window(plan: Plan, w: int, ranks: int) -> None:
    """All that a training run plans for one window: order, mix, split, pack, global batches, balance."""
    cursor, model = Cursor(w, 0), cost_model(Config())
    plan.window(w)
    end = Cursor(w, len(plan.window(w)) - plan._batch_packs)
    while cursor < end:
        batch = plan.global_batch(cursor)
        cursor = batch.cursor
        assign(cost(batch.pieces.tokens, batch.pieces.images, batch.pack_starts, model), ranks, 1)


def balances(folders: list[Path], ranks: int, packs: int, windows: int) -> Iterator[tuple[float, float]]:
    """Largest over mean cost of a rank, by its sum and in lock step, of each global batch; costs are those of the 7B."""
    plan, model = open_plan(folders, ["0.7", "0.3"], BUDGETS, IMAGE, ranks * packs), cost_model(Config())
    cursor = Cursor(0, 0)
    while cursor.window < windows:
        batch = plan.global_batch(cursor)
        cursor = batch.cursor
        costs = cost(batch.pieces.tokens, batch.pieces.images, batch.pack_starts, model)
        by_step = costs[assign(costs, ranks, 1)].sum(axis=2)
        mean = costs.sum() / ranks
        yield by_step.sum(axis=0).max() / mean, by_step.max(axis=1).sum() / mean


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def tell(name: str, values: list[float] | np.ndarray) -> float:
    """Prints the median of a figure and its spread; returns the median."""
    median = float(np.median(values))
    spread = f"  {np.min(values):.6g} to {np.max(values):.6g} of {len(values)}" if len(values) > 1 else ""
    print(f"{name:36} {median:.6g}{spread}", flush=True)
    return median


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "planner": str(PLANNER_VERSION),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "processor": cpu_name(),
    }


def captions(folder: Path, scale: Scale) -> Path:
    """70 % of the mix: an image and about 35 tokens."""
    return write_source(folder / f"captions-{scale.mix_samples}", "pair", scale.mix_samples * 7 // 10, 70, draw_pairs)


def documents(folder: Path, scale: Scale) -> Path:
    """30 % of the mix: one to three images between texts of about 200 tokens."""
    return write_source(folder / f"documents-{scale.mix_samples}", "document", scale.mix_samples * 3 // 10, 30, draw_documents)


def large(folder: Path, scale: Scale) -> Path:
    """A billion pairs in 100,000 shards."""
    return write_source(folder / f"pairs-{scale.samples}", "pair", scale.samples, scale.shards, draw_pairs)


def draw_pairs(draw: np.random.RandomState, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a caption."""
    elements = np.zeros(2 * samples, ELEMENT)
    elements["width"][::2], elements["height"][::2] = 640, 480
    elements["tokens"][1::2] = draw.poisson(35, 10_000)[draw.randint(0, 10_000, samples, np.int32)]
    return np.full(samples, 2), elements


def draw_documents(draw: np.random.RandomState, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts around one to three images."""
    counts = 2 * draw.randint(1, 4, samples) + 1
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    elements = np.zeros(len(place), ELEMENT)
    elements["tokens"] = np.where(place % 2, 0, draw.exponential(200, len(place)))
    elements["width"], elements["height"] = np.where(place % 2, 640, 0), np.where(place % 2, 480, 0)
    return counts, elements


def write_source(folder: Path, kind: str, samples: int, shards: int, draw: Draw) -> Path:
    """Columns as `xc-data merge` leaves them, written a hundred shards at a time; appears whole or not at all. No tar is made."""
    if folder.exists():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        facts = _write_columns(partial, kind, samples, shards, draw)
        (partial / SOURCE_FILE).write_text(json.dumps(asdict(facts)))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_columns(folder: Path, kind: str, samples: int, shards: int, draw: Draw) -> SourceFacts:
    a_shard, random = samples // shards, np.random.RandomState(0)
    columns, elements, tokens, images = folder / "columns", 0, 0, 0
    columns.mkdir()
    with (columns / "rows.bin").open("wb") as rows_file, (columns / "elements.bin").open("wb") as elements_file:
        for shard in range(0, shards, 100):
            part = min(100, shards - shard)
            counts, records = draw(random, part * a_shard)
            rows = np.zeros(len(counts), ROW)
            rows["shard"] = np.repeat(np.arange(shard, shard + part), a_shard)
            rows["first_element"] = elements + np.cumsum(counts) - counts
            rows["size"], rows["offset"] = 50_000, np.tile(np.arange(a_shard) * 51_200, part)
            rows["digest"] = np.arange(shard * a_shard, (shard + part) * a_shard)
            rows_file.write(rows.data)
            elements_file.write(records.data)
            elements += len(records)
            tokens += int(records["tokens"].sum())
            images += int((records["width"] > 0).sum())
    total = shards * a_shard
    with (columns / "kept.bin").open("wb") as kept_file:
        for first in range(0, total, 1_000_000):
            kept_file.write(np.arange(first, min(total, first + 1_000_000), dtype="<i8").data)
    starts = np.arange(shards)[:, None] * a_shard + np.arange(0, a_shard, BLOCK_SAMPLES)
    (columns / "blocks.bin").write_bytes(np.append(starts.ravel(), total).astype("<i8").tobytes())
    return SourceFacts(
        version=VERSION,
        kind=kind,
        tokenizer="",
        digest=f"{kind} {total}",
        shards=[f"{i:06}.tar" for i in range(shards)],
        shard_sizes=[51_200 * a_shard] * shards,
        shard_first_rows=list(range(0, total, a_shard)),
        samples=total,
        kept=total,
        elements=elements,
        text_tokens=tokens,
        images=images,
        damaged={},
        columns=columns.name,
    )


if __name__ == "__main__":
    sys.exit(main())

"""`xc-data replay`: the exact batches of a step of a run, built again from the plan, as tables and as a page.

Invariant: what is shown is what the loader handed to each rank, tensor for tensor, or the command refuses: the plan's digest must be the
run's. Where shards changed without their index, or a sample was listed in RUN/killers after the step, the token counts that the run noted
tell.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig
from data_pipeline.configure import load_data_view
from data_pipeline.errors import UserError
from data_pipeline.inspect import page
from data_pipeline.inspect.history import StepRecord, find_step
from data_pipeline.inspect.packs import PackView, Viewer, walk
from data_pipeline.loader import StepSampler
from data_pipeline.opened import Data, open_data
from data_pipeline.plan.balance import EMPTY
from data_pipeline.plan.plan import Cursor, Packs
from data_pipeline.read.killers import read_killers
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.materialise import Materialiser

WIDE = 400
"""Columns of a table that no terminal shows."""


@dataclass(frozen=True)
class MicroStep:
    """What one rank ran forward and backward at once."""

    rank: int
    micro: int
    packs: list[PackView]
    """Its packs but the empty ones."""


@dataclass(frozen=True)
class Step:
    """A step, planned but not yet built."""

    record: StepRecord
    cursor: Cursor
    """Where it begins."""
    section: DataConfig
    seed: int
    data: Data
    packs: Packs
    at: list[Cursor]
    """Where each pack lies in the plan."""
    killers: list[BadEntry]
    """Samples that killed a worker of the run: they would kill this process too."""

    def build(self, ranks: Sequence[int], pictures: bool = True) -> Iterator[tuple[MicroStep, PackedBatch]]:
        """The micro-steps of these ranks, in order, and their batches; reads shards. Views hold pixels only with `pictures`."""
        reader = Materialiser(self.data.sources, self.data.tokenizer, self.section.images, self.seed, killers=self.killers)
        viewer = Viewer(reader, pictures)
        sampler = StepSampler(self.section, self.data.plan, self.record.cost, 0, self.record.world, self.cursor, self.record.step - 1)
        places = sampler.assign(self.packs)
        for rank in ranks:
            for micro, slots in enumerate(places[:, rank].tolist()):
                own = [n for n in slots if n != EMPTY]
                place = f"rank {rank}, micro-step {micro}"
                batch, views = viewer.view([self.packs.pack(n) for n in own], [self.at[n] for n in own], place)
                yield MicroStep(rank, micro, views), batch

    @property
    def micro_steps(self) -> int:
        """Micro-steps of every rank."""
        return -(-self.section.global_batch // (self.record.world * self.section.micro_packs))


def open_step(run: Path, number: int) -> Step:
    """Finds the step in the run directory and plans it.

    Raises:
        UserError: the run does not say where the step lies, its data is not what it was, or it ended before.
    """
    record = find_step(run, number)
    view = load_data_view(run / "config.yaml")
    data = open_data(view.data, view.run.seed, view.train.steps, record.origin)
    if data.plan.digest != record.plan:
        raise UserError(
            f"{run}: its data was indexed anew or selected otherwise since (plan {record.plan[:12]} in life {record.life}, "
            f"now {data.plan.digest[:12]}): other packs would be shown (put back the index that the run read)"
        )
    cursor, step = record.known_cursor, record.known_step
    while True:
        batch = data.plan.global_batch(cursor)
        if not len(batch):
            raise UserError(f"--step {number}: the run ends after step {step - 1} (ask for an earlier one)")
        if step == number:
            break
        cursor, step = batch.cursor, step + 1
    at = [place for place, _ in islice(walk(data.plan, cursor), len(batch))]
    return Step(record, cursor, view.data, view.run.seed, data, batch, at, read_killers(run))


def replay(run: Path, number: int, rank: int | None, output: Path | None) -> None:
    """Prints the tables of a step, of all ranks or of one, and writes its page where one is asked for.

    Raises:
        UserError: as `open_step`; there is no such rank; the page cannot be written.
    """
    step = open_step(run, number)
    world = step.record.world
    if rank is not None and not 0 <= rank < world:
        raise UserError(f"--rank {rank}: life {step.record.life} had ranks 0 to {world - 1} (ask for one of them)")
    ranks = range(world) if rank is None else [rank]
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar as progress:
        total = len(ranks) * step.micro_steps
        tracked = progress.track(step.build(ranks, pictures=output is not None), total=total, description=f"step {number}")
        built = [micro for micro, _ in tracked]
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else WIDE)
    facts = _facts(step)
    console.print(Text(f"{run} step {number}", "bold"), Text("  ".join(f"{name} {value}" for name, value in facts)))
    for table in (_segments(step, built), _ranks(built), _sources(step, built, whole=rank is None)):
        console.print()
        console.print(table)
    if output is not None:
        shown = [pack for micro in built for pack in micro.packs]
        title = f"{run.name} step {number}" + ("" if rank is None else f" rank {rank}")
        page.write(page.render_packs(title, facts, step.section, step.data, shown), output)
    if rank is None:
        _compare(run, step, built)


def _facts(step: Step) -> list[tuple[str, str]]:
    record = step.record
    facts = [("life", str(record.life)), ("ranks", str(record.world)), ("from", f"window {step.cursor.window} pack {step.cursor.pack}")]
    noted = (("loss", "loss/train"), ("grad norm", "optim/grad_norm"))
    return facts + [(name, f"{record.metrics[key]:.4g}") for name, key in noted if key in record.metrics]


def _table(title: str, *columns: str, words: int = 0) -> Table:
    """A table whose last `words` columns are not numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(columns):
        text = i >= len(columns) - words
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    return table


def _segments(step: Step, built: Sequence[MicroStep]) -> Table:
    columns = ("rank", "micro", "window", "pack", "epoch", "tokens", "images", "supervised", "source", "key", "shard", "dropped")
    table = _table("segments", *columns, words=4)
    for micro in built:
        place = (str(micro.rank), str(micro.micro))
        if not micro.packs:
            table.add_row(*place, "", "", "", "0", "0", "0", "", Text("empty pack", "dim"))
        for pack in micro.packs:
            for card in pack.cards:
                counts = (card.epoch, card.tokens, card.images, card.supervised)
                words = (Text(step.data.sources[card.source].name), Text(card.key), Text(card.shard), Text(card.dropped, "red"))
                table.add_row(*place, str(pack.at.window), str(pack.at.pack), *(f"{n:,}" for n in counts), *words)
    return table


def _ranks(built: Sequence[MicroStep]) -> Table:
    table = _table("ranks", "rank", "packs", "segments", "tokens", "images", "supervised", "dropped")
    for rank in sorted({micro.rank for micro in built}):
        packs = [pack for micro in built if micro.rank == rank for pack in micro.packs]
        cards = [card for pack in packs for card in pack.cards]
        sums = (sum(p.tokens for p in packs), sum(p.images for p in packs), sum(p.supervised for p in packs))
        table.add_row(*(f"{n:,}" for n in (rank, len(packs), len(cards), *sums, sum(bool(c.dropped) for c in cards))))
    return table


def _sources(step: Step, built: Sequence[MicroStep], whole: bool) -> Table:
    """`whole`: all ranks were built, so that the run's own counts and losses are of the same tokens."""
    noted = step.record.metrics if whole else {}
    table = _table("sources", "segments", "tokens", "images", "supervised", "noted by the run", "loss", "source", words=1)
    for number, source in enumerate(step.data.sources):
        cards = [c for micro in built for pack in micro.packs for c in pack.cards if c.source == number and not c.dropped]
        parts = [part for card in cards for part in card.parts]
        counts = (len(cards), sum(p.tokens for p in parts), sum(p.kind == "image" for p in parts), sum(c.supervised for c in cards))
        tokens, loss = noted.get(f"tokens_by_source/{source.name}"), noted.get(f"loss_by_source/{source.name}")
        said = ("" if tokens is None else f"{tokens:,}", "" if loss is None else f"{loss:.4f}")
        table.add_row(*(f"{n:,}" for n in counts), *said, Text(source.name))
    return table


def _compare(run: Path, step: Step, built: Sequence[MicroStep]) -> None:
    """Says where the run counted other tokens than were built, and why: a sample was listed since, or shards are not what they were."""
    if not step.record.metrics:
        return
    listed = {(entry.source, entry.shard, entry.key) for entry in step.killers}
    counts: Counter[str] = Counter()
    without: set[str] = set()
    for card in (card for micro in built for pack in micro.packs for card in pack.cards):
        name = step.data.sources[card.source].name
        counts[name] += card.supervised
        if (name, card.shard, card.key) in listed:
            without.add(name)
    for name, found in counts.items():
        noted = step.record.metrics.get(f"tokens_by_source/{name}", 0)
        if noted != found:
            left_out = name in without and noted > found
            why = f"samples listed in {run}/killers are left out of this view" if left_out else "its shards changed since"
            print(f"warning: {name}: the run trained on {noted:,} supervised tokens, {found:,} are built now ({why})", file=sys.stderr)

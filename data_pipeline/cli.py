"""`xc-data`: from a folder of shards to what a training run reads, and a look inside.

Invariant: user errors end in one line on stderr and exit code 2; results go to stdout.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line import command_line, parse
from data_pipeline.errors import EXIT_DONE, EXIT_NEEDS_PERSON, TryAgainError, UserError
from data_pipeline.importers.command import DESCRIPTION, add_layouts
from data_pipeline.shards import query

if TYPE_CHECKING:
    from data_pipeline.shards.selection import Selection


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    sys.exit(command_line(lambda: command(argv)))


def command(argv: Sequence[str] | None) -> int:
    """Runs one command in this process; returns its exit code.

    Raises:
        UserError, TryAgainError: as the command does.
    """
    args = parse(_parser(), argv, "overrides")
    args.command = shlex.join(["xc-data", *(sys.argv[1:] if argv is None else argv)])
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-data",
        description="Index WebDataset shards in place, look at them, choose from them, and see the packs that a model will see.",
        epilog="A new source: xc-data index FOLDER --tokenizer T; xc-data merge FOLDER; xc-data stats FOLDER; then name it in a config.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    index = commands.add_parser("index", help="write a sidecar index beside each shard", description=_INDEX)
    index.add_argument("source", help="folder that holds the .tar shards, or its URL (http(s)://, s3://, gs://)")
    index.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json; lengths are counted with it")
    index.add_argument(
        "--kind", choices=("pair", "document", "conversation", "text"), help="what the samples are; guessed from the first one if not given"
    )
    index.add_argument("--workers", type=int, default=1, metavar="N", help="shards at once (default 1)")
    index.add_argument("--task", default="0/1", metavar="I/N", help="only the I-th of N shares of the shards, I from 0: for job arrays")
    index.add_argument("--index-dir", type=Path, help="where the index goes if the shards' folder is read-only or remote; one a source")
    index.add_argument("--phash", action="store_true", help="decode the images and keep perceptual hashes, for select --unique near-image")
    index.set_defaults(run=_index)

    foreign = commands.add_parser("import", help="write foreign data as shards", description=DESCRIPTION)
    add_layouts(foreign)
    foreign.set_defaults(run=_import)

    merge = commands.add_parser("merge", help="make an indexed source ready to train on", description=_MERGE)
    merge.add_argument("source", help="folder that holds the .tar shards, or its URL")
    merge.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards")
    merge.set_defaults(run=_merge)

    stats = commands.add_parser("stats", help="what a source holds: samples, tokens, images, damage", description=_STATS)
    stats.add_argument("source", nargs="+", help="merged sources: folders of shards, or their URLs")
    stats.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards (one source only)")
    stats.add_argument("--plot", type=Path, metavar="FILE", help="also draw the histograms into an .svg or .html file")
    stats.set_defaults(run=_stats)

    verify = commands.add_parser("verify", help="read shards again and compare them with their index", description=_VERIFY)
    verify.add_argument("source", help="a merged source: a folder of shards, or its URL")
    verify.add_argument("--sample", type=float, default=1.0, metavar="SHARE", help="share of each shard, drawn anew each time (default 1)")
    verify.add_argument("--workers", type=int, default=1, metavar="N", help="shards at once (default 1)")
    verify.add_argument("--task", default="0/1", metavar="I/N", help="only the I-th of N shares of the shards, I from 0: for job arrays")
    verify.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards")
    verify.set_defaults(run=_verify)

    select = commands.add_parser(
        "select",
        help="choose samples by SQL over the index, and leave out duplicates",
        description=_SELECT,
        epilog=query.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    select.add_argument("source", help="a merged source: a folder of shards, or its URL")
    select.add_argument("--where", default="true", metavar="SQL", help="condition on the columns below; all usable samples by default")
    select.add_argument(
        "--unique", default="", metavar="LIST", help=f"of {', '.join(query.UNIQUE)}: keep the first of samples that share it"
    )
    select.add_argument(
        "--near-bits", type=int, default=query.NEAR_BITS, metavar="N", help="bits of 64 that near images may differ in (%(default)s)"
    )
    select.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards")
    select.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the selection; must not exist")
    select.set_defaults(run=_select)

    ledger = commands.add_parser("ledger", help="what a run had to leave out, and a selection without it", description=_LEDGER)
    ledger.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    ledger.add_argument("--source", metavar="NAME", help="a source of the run's config: write a selection of it for the next run")
    ledger.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="the selection; must not exist")
    ledger.set_defaults(run=_ledger)

    preview = commands.add_parser("preview", help="a page that shows packs as the model will see them", description=_PREVIEW)
    preview.add_argument("config", type=Path, help="a stage's YAML; its `data` section is read")
    preview.add_argument("-o", "--output", type=Path, default=Path("preview.html"), help="the page (default preview.html)")
    preview.add_argument("--packs", type=int, default=8, help="packs shown, from the start of the run (default 8)")
    preview.add_argument("--key", metavar="KEY", help="show the pack in which this sample is first drawn instead")
    preview.add_argument("overrides", nargs="*", help="key=value in the data section, such as data.context=512")
    preview.set_defaults(run=_preview)

    replay = commands.add_parser("replay", help="the exact batches of a step of a run", description=_REPLAY)
    replay.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="as in metrics.jsonl and on the progress line; the first is 1")
    replay.add_argument("--rank", type=int, metavar="R", help="only what this rank ran (default: all ranks)")
    replay.add_argument("-o", "--output", type=Path, help="also write the page of these packs, as xc-data preview does")
    replay.set_defaults(run=_replay)

    simulate = commands.add_parser("simulate", help="what a run would do to its ranks and disks", description=_SIMULATE)
    simulate.add_argument("config", type=Path, help="a stage's YAML; its `data` section is read")
    simulate.add_argument("--world", type=int, required=True, metavar="N", help="data-parallel ranks")
    simulate.add_argument("--steps", type=int, metavar="K", help="steps from the start of the run (default 1000, or to the run's end)")
    simulate.add_argument("--cost", metavar="T,P,I", help="costs of a token, a pair of tokens of a segment, an image (default: the 7B's)")
    simulate.add_argument("-o", "--output", type=Path, help="also write a page with curves over steps")
    simulate.add_argument("overrides", nargs="*", help="key=value in the data section, such as data.global_batch=512")
    simulate.set_defaults(run=_simulate)
    return parser


_INDEX = """Reads each tar once, in place, and writes NAME.index.parquet: every sample's place, lengths, image sizes, digest and, if it
cannot be used, why. Atomic per shard and resumable: run it again and only what is missing or changed is done. --phash may come later:
it changes no run, unless it finds pictures that do not decode."""
_MERGE = "Joins the sidecars of a source into source.json and the columns that the plan reads. Run it after every index."
_STATS = "Prints what the index knows: lengths, image sizes, images per document, tokens, damaged share. Opens no image."
_VERIFY = """Reads samples as a training run does and compares their digests with the index. Names shard, key and bytes of each that is
not what was indexed. Exits with 0 if all are, with 70 if not, with 75 where the file system failed."""
_SELECT = """Writes a selection: a small folder that a config names, and that a run then uses instead of the whole source. The index alone
is read, with DuckDB; no tar is opened or rewritten. Damaged samples are never in it. Of samples that share what --unique names, the
first in physical order stays; near-image needs an index made with --phash. A selection holds for one index of its source."""
_LEDGER = """Prints what a run left out, by source and reason. With --source and -o, writes a selection of what the run used of that source
without the samples that it dropped, to be named in the config of the next run."""
_PREVIEW = "Writes one self-contained page: a bar a pack, each segment's images and text in order, supervised words marked."

_REPLAY = """Builds a step's batches again from the run's config and the plan: each segment with its key, shard, rank and micro-step,
and what was dropped and why. What was in the spike? Refuses where the data was indexed anew since; needs the shards."""

_SIMULATE = """Walks the plan from the index alone, no shard opened: fill, balance over ranks, image tokens, epochs by source, shuffle
quality, bytes and shards a step, steps of the run. Try world sizes, windows and mixes here before a job costs anything."""


def _index(args: argparse.Namespace) -> int:
    from data_pipeline.read.paths import index_folder, to_path
    from data_pipeline.samples import Kind
    from data_pipeline.shards.index import find_kind, index_shard, list_shards
    from data_pipeline.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.tokenizer)
    number, count = _task(args.task)
    source = to_path(args.source)
    index_dir = index_folder(source, args.index_dir)
    shards = list_shards(source)
    kind = Kind(args.kind) if args.kind else find_kind(shards)
    mine = shards[number::count]
    work = partial(index_shard, index_dir=index_dir, kind=kind, tokenizer=tokenizer, phash=args.phash)
    written = sum(_watched(work, mine, args.workers, f"index {source.name}", [shard.name for shard in mine]))
    guessed = "" if args.kind else " (guessed from the first sample)"
    done = f"{written} indexed, {len(mine) - written} up to date"
    print(f"{args.source}: {len(mine)} of {len(shards)} shards, kind {kind.value}{guessed}, {done}")
    print(f"next: xc-data merge {args.source}{f' --index-dir {args.index_dir}' if args.index_dir else ''}")
    return EXIT_DONE


def _watched(work: Callable[[Any], Any], items: Sequence[Any], workers: int, what: str, names: Sequence[str]) -> Iterator[Any]:
    """The results of `work` for shards of these names in order, from this process or several, behind a progress bar.

    Raises:
        TryAgainError: a process died.
    """
    from rich.console import Console
    from rich.progress import Progress

    from data_pipeline.processes import begin_in_pool
    from data_pipeline.read.remote import worker_context

    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar as progress, ProcessPoolExecutor(max(1, workers), worker_context(), begin_in_pool) as pool:
        results = _together(pool, work, items, names) if workers > 1 else map(work, items)
        yield from progress.track(results, total=len(items), description=what)


def _together(pool: ProcessPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str]) -> Iterator[Any]:
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        time.sleep(0.2)  # Ctrl-C, which ends the workers, is on its way to this process too, and is then what is said
        left = [name for name, future in zip(names, futures, strict=True) if not future.done() or future.exception()]
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        said = f"a worker died; {len(left)} of {len(names)} shards are not done: {', '.join(left[:_NAMED])}{more}"
        raise TryAgainError(f"{said} (often for want of memory: run the same with --workers 1)") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_NAMED = 3
"""Shards that a message names."""


def _task(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--task {text!r} is not I/N with 0 <= I < N (for the first of eight: --task 0/8)")
    return int(number), int(count)


def _import(args: argparse.Namespace) -> int:
    from data_pipeline.importers.command import run

    return run(args, *_task(args.task), command)


def _merge(args: argparse.Namespace) -> int:
    from data_pipeline.read.paths import index_folder, to_path
    from data_pipeline.shards.merge import merge
    from data_pipeline.shards.write import require_whole

    source = to_path(args.source)
    if isinstance(source, Path):
        require_whole(source)
    facts = merge(source, index_folder(source, args.index_dir))
    print(f"{args.source}: {facts.kept} of {facts.samples} samples, {facts.text_tokens} text tokens, {facts.images} images")
    for reason, count in sorted(facts.damaged.items(), key=lambda item: -item[1]):
        print(f"  left out: {count} x {reason}")
    print(f"next: xc-data stats {args.source}{f' --index-dir {args.index_dir}' if args.index_dir else ''}")
    return EXIT_DONE


def _stats(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.stats import print_stats
    from data_pipeline.read.paths import to_path

    if args.index_dir and len(args.source) > 1:
        raise UserError("--index-dir names the index of one source (give one source)")
    print_stats([to_path(source) for source in args.source], args.index_dir, args.plot)
    return EXIT_DONE


def _verify(args: argparse.Namespace) -> int:
    from data_pipeline.read.paths import to_path
    from data_pipeline.shards.source import ShardSource
    from data_pipeline.shards.verify import Verified, print_verified, verify_shard

    if not 0 < args.sample <= 1:
        raise UserError(f"--sample {args.sample} is no share (give a number above 0 and at most 1)")
    number, count = _task(args.task)
    folder = to_path(args.source)
    source = ShardSource(folder.name, folder, args.index_dir)
    mine = range(len(source.facts.shards))[number::count]
    found = Verified()
    names, work = [source.facts.shards[shard] for shard in mine], partial(verify_shard, source=source, share=args.sample)
    for part in _watched(work, mine, args.workers, f"verify {folder.name}", names):
        found.add(part)
    print_verified(source, len(mine), found)
    if found.unread and not found.wrong:
        raise TryAgainError(f"{len(found.unread)} of {len(mine)} shards could not be read to their end (run the same again)")
    return EXIT_NEEDS_PERSON if found.wrong else EXIT_DONE


def _select(args: argparse.Namespace) -> int:
    from data_pipeline.read.paths import to_path
    from data_pipeline.shards.select import select

    unique = [u.strip() for u in args.unique.split(",") if u.strip()]
    made = select(to_path(args.source), args.index_dir, args.where, unique, args.near_bits, args.command, args.output)
    return _say_selection(args.source, made, args.output)


def _ledger(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.ledger import print_ledger, select_without

    if (args.source is None) != (args.output is None):
        raise UserError("--source and -o go together (give both for a selection, none for the table)")
    if args.source is None:
        print_ledger(args.run_dir)
        return EXIT_DONE
    made = select_without(args.run_dir, args.source, args.command, args.output)
    return _say_selection(args.source, made, args.output)


def _say_selection(source: object, made: "Selection", folder: Path) -> int:
    print(f"{source}: {made.samples} of {made.of} samples selected, {made.text_tokens} text tokens, {made.images} images")
    for criterion, count in made.left_out.items():
        print(f"  left out: {count} by {criterion}")
    print(f"next: in a config, data.sources.NAME.selection: {folder}")
    return EXIT_DONE


def _preview(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.preview import write_preview

    write_preview(args.config, args.overrides, args.packs, args.key, args.output)
    print(f"open {args.output.resolve()}")
    return EXIT_DONE


def _replay(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.replay import replay

    replay(args.run_dir, args.step, args.rank, args.output)
    if args.output:
        print(f"open {args.output.resolve()}")
    return EXIT_DONE


def _simulate(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.simulate import simulate
    from data_pipeline.inspect.simulated import show

    found = simulate(args.config, args.overrides, args.world, args.steps, args.cost)
    show(found, args.config.name, args.output)
    if args.output:
        print(f"open {args.output.resolve()}")
    return EXIT_DONE


if __name__ == "__main__":
    main()

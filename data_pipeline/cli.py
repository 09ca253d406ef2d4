"""`xc-data`: from a folder of shards to what a training run reads, and a look inside.

Invariant: user errors end in one line on stderr and exit code 2; results go to stdout.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from data_pipeline.errors import EXIT_DONE, TryAgainError, UserError


def command_line(run: Callable[[], int]) -> int:
    """Runs a command, turning its user errors into one line and their exit code."""
    try:
        return run()
    except (UserError, TryAgainError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    sys.exit(command_line(lambda: args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-data",
        description="Index WebDataset shards in place, look at them, and see the packs that a model will see.",
        epilog="A new source: xc-data index FOLDER --tokenizer T; xc-data merge FOLDER; xc-data stats FOLDER; then name it in a config.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    index = commands.add_parser("index", help="write a sidecar index beside each shard", description=_INDEX)
    index.add_argument("source", help="folder that holds the .tar shards, or its URL (http(s)://, s3://, gs://)")
    index.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json; lengths are counted with it")
    index.add_argument("--kind", choices=("pair", "document", "text"), help="what the samples are; guessed from the first one if not given")
    index.add_argument("--workers", type=int, default=1, metavar="N", help="shards at once (default 1)")
    index.add_argument("--task", default="0/1", metavar="I/N", help="only the I-th of N shares of the shards, I from 0: for job arrays")
    index.add_argument("--index-dir", type=Path, help="where the index goes if the shards' folder is read-only or remote")
    index.set_defaults(run=_index)

    merge = commands.add_parser("merge", help="make an indexed source ready to train on", description=_MERGE)
    merge.add_argument("source", help="folder that holds the .tar shards, or its URL")
    merge.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards")
    merge.set_defaults(run=_merge)

    stats = commands.add_parser("stats", help="what a source holds: samples, tokens, images, damage", description=_STATS)
    stats.add_argument("source", nargs="+", help="merged sources: folders of shards, or their URLs")
    stats.add_argument("--index-dir", type=Path, help="where the index is, if not beside the shards (one source only)")
    stats.set_defaults(run=_stats)

    preview = commands.add_parser("preview", help="a page that shows packs as the model will see them", description=_PREVIEW)
    preview.add_argument("config", type=Path, help="a stage's YAML; its `data` section is read")
    preview.add_argument("-o", "--output", type=Path, default=Path("preview.html"), help="the page (default preview.html)")
    preview.add_argument("--packs", type=int, default=8, help="packs shown, from the start of the run (default 8)")
    preview.add_argument("overrides", nargs="*", help="key=value in the data section, such as data.context=512")
    preview.set_defaults(run=_preview)
    return parser


_INDEX = """Reads each tar once, in place, and writes NAME.index.parquet: every sample's place, lengths, image sizes, digest and, if it
cannot be used, why. Atomic per shard and resumable: run it again and only what is missing or changed is done."""
_MERGE = "Joins the sidecars of a source into source.json and the columns that the plan reads. Run it after every index."
_STATS = "Prints what the index knows: lengths, image sizes, images per document, tokens, damaged share. Opens no image."
_PREVIEW = "Writes one self-contained page: a bar a pack, each segment's images and text in order, supervised words marked."


def _index(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from data_pipeline.read.paths import index_folder, to_path
    from data_pipeline.read.remote import worker_context
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
    work = partial(index_shard, index_dir=index_dir, kind=kind, tokenizer=tokenizer)
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar as progress, ProcessPoolExecutor(max(1, args.workers), worker_context()) as pool:
        results = pool.map(work, mine) if args.workers > 1 else map(work, mine)
        written = sum(progress.track(results, total=len(mine), description=f"index {source.name}"))
    guessed = "" if args.kind else " (guessed from the first sample)"
    done = f"{written} indexed, {len(mine) - written} up to date"
    print(f"{args.source}: {len(mine)} of {len(shards)} shards, kind {kind.value}{guessed}, {done}")
    print(f"next: xc-data merge {args.source}{f' --index-dir {args.index_dir}' if args.index_dir else ''}")
    return EXIT_DONE


def _task(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--task {text!r} is not I/N with 0 <= I < N (for the first of eight: --task 0/8)")
    return int(number), int(count)


def _merge(args: argparse.Namespace) -> int:
    from data_pipeline.read.paths import index_folder, to_path
    from data_pipeline.shards.merge import merge

    source = to_path(args.source)
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
    for source in args.source:
        print_stats(to_path(source), args.index_dir)
    return EXIT_DONE


def _preview(args: argparse.Namespace) -> int:
    from data_pipeline.inspect.preview import write_preview

    write_preview(args.config, args.overrides, args.packs, args.output)
    print(f"open {args.output.resolve()}")
    return EXIT_DONE


if __name__ == "__main__":
    main()

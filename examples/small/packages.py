"""Reads the packages that the small model's pairs and documents are made of.

Invariant: every package is pinned by version and SHA-256; what is read depends on nothing else. Nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import html
import io
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lxml.etree
import lxml.html
from captions import filed_under, label_of
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from sources import GALLERY, PICTURES, Package, elements_of, fetch, on_white, plain_text, read_concepts, read_members

SIDE = 224
"""Longest side of a stored picture, in pixels; of music the height."""
MOST_OF_A_TITLE = 3
KNOWN_NOT_SEEN = ("signs_and_symbols/flags/", "geography/", "special/patterns/")
"""Clip art whose title its picture does not tell: flags, maps, numbered patterns. Of emoji, flags are not read either."""
LEAST_WORDS = 30
"""Of a document."""


@dataclass(frozen=True)
class Bounds:
    """Which pictures of a source are taken, and the width and height, in pixels, that a stored one fits into."""

    least_side: int = 48
    most_aspect: float = 4
    box: tuple[int, int] = (SIDE, SIDE)


@dataclass(frozen=True)
class Pages:
    """Where a source's pages lie: its packages, as one tree, the folder of that, and a pattern of the pages' names in there."""

    packages: tuple[Package, ...]
    folder: str
    names: str
    bounds: Bounds = Bounds()


def _debian(name: str, version: str, sha256: str) -> Package:
    archive = f"{name}_{version.replace(':', '%3a')}_all.deb"
    return Package(archive, sha256, ("apt-get", "download", "-q", f"{name}={version}"))


TWEMOJI = Package(
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ("npm", "pack", "--silent", "emoji-datasource-twitter@16.0.0"),
)
STYLES = PICTURES | {"twemoji": (TWEMOJI, "package/img/twitter/64/")}
EMOJI_SIDE = 128
STAMPS = _debian("tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34")
CLIPART = _debian("openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02")
CLIPART_FACTS = _debian("openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5")
GIMP = _debian("gimp-help-en", "2.10.34-2", "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36")
LEARN = _debian("python-sklearn-doc", "1.2.1+dfsg-1", "4e244556326064e87e7563e3e544c2288d44b5719db2d7b3a85c9a84ae93488d")
GRASS = _debian("grass-doc", "8.2.1-1", "0f6da53d1f7d51b019dfe64bf45718b64022989afc94bb6c833f495aa2f61ff7")

MUSIC_HELP = _debian("lilypond-doc-html", "2.24.1-2", "be9fb743e58bd5ad4710146fe05e7c5f447fe4559e42c6acef1916d53e4bec60")
MUSIC_PICTURES = _debian("lilypond-doc", "2.24.1-2", "946f18c3407a5bd2b9d4e374d2774c547ab7c5e6f9f3e2dd66c4cc77c74f1380")

PAGES = {
    "gimp": Pages((GIMP,), "./usr/share/gimp/2.0/help/en/", r"[^/]+\.html"),
    "grass": Pages((GRASS,), "./usr/share/doc/grass-doc/html/", r"[^/]+\.html"),
    "learn": Pages((LEARN,), "./usr/share/doc/python-sklearn-doc/html/", r"auto_examples/\w+/plot_\w+\.html"),
    "skimage": Pages((GALLERY,), "./usr/share/doc/python-skimage-doc/html/", r"auto_examples/\w+/plot_\w+\.html"),
}
"""Sources of `documents/`, by what their pages' keys begin with."""
MUSIC = {
    "lilypond": Pages(
        (MUSIC_HELP, MUSIC_PICTURES),
        "./usr/share/doc/lilypond/html/Documentation/",
        r"[a-z-]+/[^./]+\.html",  # `.de.html` is the German page; pages of a whole manual lie in folders of their own, *-big-page
        Bounds(least_side=32, most_aspect=64, box=(4 * SIDE, SIDE)),
    ),
}
"""LilyPond's help. A line of music is wide: at a square's width its notes could not be read."""
FURNITURE = (
    "navheader navfooter toc note tip warning caution sk-landing-container navbar sidebar related sphinxsidebar footer topmenu tocframe"
)
"""Classes and ids of what is no part of a page's text."""
LOGOS = re.compile(r"logo|thumb|icon|callouts|_static", re.I)
NUMBER = re.compile(r"^(Figure|Table)\s+[\d.]+\s*")


@dataclass(frozen=True)
class Pair:
    """A picture and its caption: where its source files it, and what it is called there (`animal bird: parrot`)."""

    key: str
    caption: str
    image: Image.Image

    @property
    def label(self) -> str:
        """What tells concepts apart, whatever the source."""
        return label_of(self.caption)


@dataclass(frozen=True)
class Figure:
    """A picture of a document, with its caption where the page gives one."""

    image: Image.Image
    caption: str | None


@dataclass(frozen=True)
class Document:
    """A page: paragraphs and figures in reading order."""

    name: str
    elements: list[str | Figure]

    @property
    def paragraphs(self) -> list[str]:
        return [e for e in self.elements if isinstance(e, str)]

    @property
    def figures(self) -> list[Figure]:
        return [e for e in self.elements if isinstance(e, Figure)]


def open_image(data: bytes, bounds: Bounds = Bounds()) -> Image.Image | None:
    """On white, shrunk into the bounds' box; None for what is too small, too narrow, or no picture."""
    try:
        image = Image.open(io.BytesIO(data))
        short, long = sorted(image.size)
        if short < bounds.least_side or long > bounds.most_aspect * short or short * long > 40_000_000:
            return None
        image = on_white(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for files that are none
        return None
    image.thumbnail(bounds.box, Image.Resampling.LANCZOS)
    return image


def _key(source: str, name: str) -> str:
    """A shard's key; what it loses of a name (`viewmag+`, `viewmag-`) is told apart by a hash."""
    return f"{source}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def read_pairs(folder: Path) -> Iterator[Pair]:
    """All pairs of all packages, in a fixed order."""
    yield from _emoji(folder)
    yield from _stamps(folder)
    yield from _clip_art(folder)


def _emoji(folder: Path) -> Iterator[Pair]:
    for concept in read_concepts(folder, STYLES, EMOJI_SIDE):
        for style, image in concept.pictures.items():
            yield Pair(f"{style}-{concept.code}", concept.caption, image)


def _stamps(folder: Path) -> Iterator[Pair]:
    files = read_members(fetch(STAMPS, folder), "./usr/share/tuxpaint/stamps/")
    for name in sorted(n for n in files if n.endswith(".txt")):
        stem = name.removesuffix(".txt")
        caption = plain_text(files[name].decode("utf-8", "replace").split("\n")[0]).rstrip(".")
        image = open_image(files[f"{stem}.png"]) if f"{stem}.png" in files else None
        if image and caption:
            yield Pair(_key("stamp", stem), f"{filed_under(name)}: {caption}", image)


def _clip_art(folder: Path) -> Iterator[Pair]:
    """Drawings in the public domain whose title names them."""
    pictures = read_members(fetch(CLIPART, folder), "./usr/share/openclipart/png/")
    facts = read_members(fetch(CLIPART_FACTS, folder), "./usr/share/openclipart/svg/")
    shown = [name for name in sorted(pictures) if not name.startswith(KNOWN_NOT_SEEN)]
    titles = {name: _title(facts.get(name.removesuffix(".png") + ".svg", b"")) for name in shown}
    for name, title in telling(titles).items():
        image = open_image(pictures[name])
        if image:
            yield Pair(_key("clip", name.removesuffix(".png")), f"{filed_under(name)}: {title}", image)


def telling(titles: dict[str, str | None]) -> dict[str, str]:
    """Those of the titles that name a drawing: what many drawings are called is their collection."""
    borne = Counter(titles.values())
    return {name: title for name, title in titles.items() if title and borne[title] <= MOST_OF_A_TITLE}


def _title(svg: bytes) -> str | None:
    text = svg.decode("utf-8", "replace")
    title = re.search(r"<dc:title>([^<]+)</dc:title>", text)
    if not title or "PublicDomain" not in text or "gramastar" in text:
        return None
    words = re.sub(r" \d+$", "", plain_text(html.unescape(title[1]).replace("_", " ").replace("-", " ")).lower())
    return words if re.search(r"[a-z]{3}", words) and len(words) <= 80 and "converted from" not in words else None


def read_documents(folder: Path, sources: dict[str, Pages] = PAGES) -> Iterator[Document]:
    """Pages with a picture and `LEAST_WORDS` words, in a fixed order."""
    for source, pages in sources.items():
        files: dict[str, bytes] = {}
        for package in pages.packages:
            files |= read_members(fetch(package, folder), pages.folder)
        for path in sorted(p for p in files if re.fullmatch(pages.names, p)):
            document = Document(_key(source, path.removesuffix(".html")), _elements(files, path, pages.bounds))
            if document.figures and sum(len(p.split()) for p in document.paragraphs) >= LEAST_WORDS:
                yield document


def _elements(files: dict[str, bytes], path: str, bounds: Bounds) -> list[str | Figure]:
    page = lxml.html.fromstring(files[path].decode("utf-8", "replace").encode())
    for name in FURNITURE.split():
        for node in (*page.find_class(name), *page.xpath(f"//*[@id='{name}']")):
            if node.getparent() is not None:
                node.drop_tree()
    found = page.find_class("sphx-glr-example-title")
    elements: list[str | Figure] = []
    body = found[0] if found else page.find("body")
    for kind, value in elements_of(body) if body is not None else ():
        if kind == "text":
            elements.append(value)
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), value or ""))
        image = open_image(files[target], bounds) if target in files and not LOGOS.search(target) else None
        if image:
            title = elements.pop() if elements and isinstance(elements[-1], str) and NUMBER.match(elements[-1]) else None
            elements.append(Figure(image, NUMBER.sub("", title) if title else None))
    return [NUMBER.sub("", e) if isinstance(e, str) else e for e in elements if not isinstance(e, str) or NUMBER.sub("", e)]

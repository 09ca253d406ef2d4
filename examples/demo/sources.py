"""Reads the public packages that the demo data is made of: emoji pictures with their labels, and gallery pages with their figures.

Invariant: every package is pinned by version and SHA-256, and what is read from it depends on nothing else. Nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lxml.html
import numpy as np
from PIL import Image

PICTURE_SIDE = 72
"""Pixels. Training crops 64 of them."""

NEAR_DUPLICATE_RMS = 6.0
"""Two pictures of one style that differ by less (root mean square, 0 to 255) are one picture under two labels."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry; `fetch` is the command that downloads it into the current folder."""

    archive: str
    sha256: str
    fetch: tuple[str, ...]


FLUENT = Package(
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ("npm", "pack", "--silent", "@lobehub/fluent-emoji-3d@1.1.0"),
)
NOTO = Package(
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ("npm", "pack", "--silent", "emoji-datasource-google@16.0.0"),
)
LABELS = Package(
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ("npm", "pack", "--silent", "emojibase-data@17.0.0"),
)
GALLERY = Package(
    "python-skimage-doc_0.19.3-8_all.deb",
    "2c87d8f7d4504b29fe80283a24a153fb4175b0e4964bd90a2a0152b36bb6b468",
    ("apt-get", "download", "python-skimage-doc=0.19.3-8"),
)

Styles = dict[str, tuple[Package, str]]
PICTURES: Styles = {"fluent": (FLUENT, "package/assets/"), "noto": (NOTO, "package/img/google/64/")}
"""Art style -> its package and the folder of its pictures, which are named by code points."""


@dataclass(frozen=True)
class Concept:
    """What an emoji means, and how each art style draws it. `code` is its code points without variation selectors."""

    code: str
    subgroup: str
    label: str
    tags: tuple[str, ...]
    pictures: dict[str, Image.Image] = field(compare=False)

    @property
    def caption(self) -> str:
        return f"{self.subgroup}: {self.label}"

    @property
    def description(self) -> str | None:
        """The tags, then the caption that they lead to; None where the tags say nothing that the label does not.

        In this order a language model learns that what stands before a caption tells it. One that comes pretrained knows that.
        """
        return f"{', '.join(self.tags)}. {self.caption}" if set(self.tags) - set(self.label.split()) else None


@dataclass(frozen=True)
class Document:
    """A page: its elements in reading order, each a paragraph or a picture."""

    name: str
    source: str
    elements: list[str | Image.Image]

    @property
    def paragraphs(self) -> list[str]:
        return [element for element in self.elements if isinstance(element, str)]


def fetch(package: Package, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is not there. Raises SystemExit where it cannot be, or has other bytes than were pinned."""
    path = folder / package.archive
    if not path.exists():
        try:
            subprocess.run(package.fetch, cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"error: {path} cannot be downloaded: {error} (mend that, or put the file there)") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{path}: SHA-256 is {digest}, expected {package.sha256}; delete the file to download it again")
    return path


def open_archive(archive: Path) -> tarfile.TarFile:
    if archive.suffix == ".deb":
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
        return tarfile.open(fileobj=io.BytesIO(unpacked))
    return tarfile.open(archive)


def read_members(archive: Path, prefix: str) -> dict[str, bytes]:
    """The regular files of an npm or Debian archive whose path starts with `prefix`, which is cut off their names."""
    with open_archive(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith(prefix)]
        return {member.name.removeprefix(prefix): tar.extractfile(member).read() for member in members}


def plain_text(text: str) -> str:
    """One line, composed Unicode, straight quotes: one spelling a word."""
    text = unicodedata.normalize("NFC", text).translate(str.maketrans("\u2018\u2019\u201c\u201d\u00a0", "''\"\" "))
    return re.sub(r"\s+", " ", text).strip()


def on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def open_picture(data: bytes, side: int = PICTURE_SIDE) -> Image.Image:
    """A square emoji on white."""
    return on_white(Image.open(io.BytesIO(data))).resize((side, side), Image.Resampling.LANCZOS)


def open_figure(data: bytes) -> Image.Image:
    """A figure on white: short side 72, long side at most 144, and white bands where that would leave a side below 64."""
    image = on_white(Image.open(io.BytesIO(data)))
    scale = min(PICTURE_SIDE / min(image.size), 2 * PICTURE_SIDE / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", tuple(max(64, side) for side in size), "white")
    corner = ((canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return canvas


def code_of(name: str) -> str:
    """Code points without the variation selector, which the packages write or leave out as they like."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def is_kept(code: str, group: str) -> bool:
    """False for what a small model cannot learn from, or what would leak into the held-out pictures.

    Flags: the Fluent package redraws Noto's. Man and woman forms of a person, and families: nearly the same picture as another.
    Components (bare skin tones, hair): no concept of their own.
    """
    gendered = code.startswith(("1f468-200d", "1f469-200d")) or "-200d-2640" in code or "-200d-2642" in code
    return group not in ("flags", "component") and not gendered


def read_concepts(folder: Path, styles: Styles = PICTURES, side: int = PICTURE_SIDE) -> list[Concept]:
    """Every kept emoji that at least one style draws, in the order of the emoji standard; skin tones are not read."""
    labels = read_members(fetch(LABELS, folder), "package/")
    names = json.loads(labels["meta/groups.json"])
    files = {style: read_members(fetch(package, folder), prefix) for style, (package, prefix) in styles.items()}
    pictures = {style: {code_of(name.rpartition(".")[0]): data for name, data in sorted(files[style].items())} for style in styles}
    concepts = []
    for entry in sorted(json.loads(labels["en/data.json"]), key=lambda entry: entry.get("order", 0)):
        code = code_of(entry["hexcode"])
        drawn = {style: open_picture(pictures[style][code], side) for style in styles if code in pictures[style]}
        if "group" in entry and drawn and is_kept(code, names["groups"][str(entry["group"])]):
            subgroup = names["subgroups"][str(entry["subgroup"])].replace("-", " ")
            tags = tuple(plain_text(tag).lower() for tag in entry.get("tags", []))
            concepts.append(Concept(code, subgroup, plain_text(entry["label"]).lower(), tags, drawn))
    return without_duplicates(concepts, styles)


def without_duplicates(concepts: list[Concept], styles: Collection[str]) -> list[Concept]:
    """Drops every concept whose label, or nearly whose picture in some style, an earlier concept has."""
    kept: list[Concept] = []
    seen = {style: np.zeros((0, 36 * 36 * 3), np.float32) for style in styles}
    labels: set[str] = set()
    for concept in concepts:
        thumbs = {style: np.asarray(p.resize((36, 36)), np.float32).reshape(1, -1) for style, p in concept.pictures.items()}
        closest = min((rms(seen[style], thumb) for style, thumb in thumbs.items()), default=np.inf)
        if concept.label in labels or closest < NEAR_DUPLICATE_RMS:
            continue
        labels.add(concept.label)
        kept.append(concept)
        for style, thumb in thumbs.items():
            seen[style] = np.concatenate([seen[style], thumb])
    return kept


def rms(many: np.ndarray, one: np.ndarray) -> float:
    """The root mean square difference between `one` and the closest row of `many`."""
    return float(np.sqrt(((many - one) ** 2).mean(axis=1)).min(initial=np.inf))


# Gallery pages

SKIPPED_TAGS = {"pre", "table", "script", "style", "button", "form"}
SKIPPED_CLASSES = {"highlight", "footnote", "citation", "sphx-glr-download-link-note", "sphx-glr-footer", "sphx-glr-timing",
                   "sphx-glr-signature", "sphx-glr-script-out", "sphx-glr-thumbcontainer", "contents"}  # fmt: skip
HTML = "./usr/share/doc/python-skimage-doc/html/"


def read_documents(folder: Path) -> list[Document]:
    """The gallery pages that hold at least one figure and 30 words of prose, ordered by name."""
    files = read_members(fetch(GALLERY, folder), HTML)
    documents = []
    for path in sorted(path for path in files if re.fullmatch(r"auto_examples/\w+/plot_\w+\.html", path)):
        page = lxml.html.fromstring(files[path].decode("utf-8"))
        elements: list[str | Image.Image] = []
        for kind, value in elements_of(page.find_class("sphx-glr-example-title")[0]):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), value)) if kind == "image" else ""
            elements.append(open_figure(files[target]) if kind == "image" else value)
        section, file = path.split("/")[1:]  # two sections have a page of one name
        name = f"{section}-{file.removeprefix('plot_').removesuffix('.html')}".replace("_", "-")
        document = Document(name, f"https://scikit-image.org/docs/0.19.x/{path}", elements)
        if len(document.paragraphs) < len(elements) and sum(len(p.split()) for p in document.paragraphs) >= 30:
            documents.append(document)
    return documents


def elements_of(node: lxml.html.HtmlElement) -> Iterator[tuple[str, str]]:
    """("text", paragraph or heading) and ("image", relative path) of a page in reading order, without code, formulas and furniture."""
    for child in node.iterchildren(tag=lxml.etree.Element):
        if child.tag in SKIPPED_TAGS or SKIPPED_CLASSES & set(child.get("class", "").split()):
            continue
        if child.tag == "img":
            yield "image", child.get("src")
        elif child.tag in ("p", "h1", "h2", "h3", "h4", "li", "dt") and child.find(".//p") is None and child.find(".//img") is None:
            text = "" if child.find_class("math") else prose(child)
            if text and text.rstrip(":").lower() not in ("references", "reference"):
                yield "text", text
        else:
            yield from elements_of(child)


def prose(node: lxml.html.HtmlElement) -> str:
    """The words that a reader sees, without the permalink sign of a heading."""
    for mark in node.find_class("headerlink"):
        mark.drop_tree()
    return plain_text(node.text_content())

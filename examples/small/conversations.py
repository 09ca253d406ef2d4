"""Conversations for SFT and for the composition stage, made from the training pairs and documents.

Invariant: nothing is invented: every answer stands in the data, and the questions of composition are those of `compose/prompts.py`.

- caption: the picture, and what it shows: the caption
- which: the picture and four captions of the same package, lettered; the letter
- about: the first paragraphs of a page; its first line, which is its title
- write, lines, figure, choose: the steps of composition, for pages with figures: the title gives the page's first paragraphs; the marks
  of the lines that figures follow; the figure's own caption; among the figure and three of other pages, all different, its letter
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from compose import prompts
from compose.assistant import Parts
from compose.pictures import Picture
from compose.prompts import Placed

if TYPE_CHECKING:
    from packages import Document, Figure, Pair
    from PIL import Image

Sample = dict[str, str | bytes]
WORDS = 220
"""Words of a page that a conversation shows."""
PLACEHOLDER = "<ImageHere>"


def of_pairs(pairs: Sequence[Pair], encode: Callable[[Image.Image], bytes]) -> Iterator[Sample]:
    """A caption of every pair; every other pair also as a choice among four captions of its package."""
    captions: dict[str, list[str]] = {}
    for pair in pairs:
        captions.setdefault(pair.key.split("-")[0], []).append(pair.caption)
    for pair in pairs:
        picture = Picture(pair.key, encode(pair.image))
        yield conversation(f"caption-{pair.key}", [picture, "What does this picture show?"], pair.caption)
        if number(pair.key, 2):
            continue
        pool = captions[pair.key.split("-")[0]]
        others = [pool[number(f"{pair.key} {i}", len(pool))] for i in range(12)]
        options = list(dict.fromkeys(o for o in others if o != pair.caption))[:3]
        at = number(f"{pair.key} place", len(options) + 1)
        options.insert(at, pair.caption)
        yield conversation(f"which-{pair.key}", [picture, prompts.letter("Which caption fits?", options)], prompts.OPTIONS[at])


def of_documents(documents: Sequence[Document]) -> Iterator[Sample]:
    """What each page is about."""
    for document in documents:
        title, *lines = document.paragraphs
        if lines:
            yield conversation(f"about-{document.name}", [f"{_shorten(lines)}\nWhat is this page about? Answer with its title."], title)


def of_composition(documents: Sequence[Document], encode: Callable[[Image.Image], bytes]) -> Iterator[Sample]:
    """The steps of composition."""
    every = [(document.name, figure) for document in documents for figure in document.figures]
    for document in documents:
        title, placed = _placed(document)
        if len(placed) < 3:
            continue
        lines = [line for line, _ in placed]
        marks = [i for i, (_, figures) in enumerate(placed) if figures]
        yield conversation(f"write-{document.name}", prompts.write(f"Explain: {title}", []), "\n".join([title, *lines]))
        answer = ", ".join(f"<Seg{i}>" for i in marks) or "none"
        yield conversation(f"lines-{document.name}", prompts.choose_lines(lines, max(1, len(marks))), answer)
        before: list[Placed] = []
        for i, (line, figures) in enumerate(placed):
            before.append(Placed(line))
            for figure in figures[:1]:
                name = f"{document.name}-{i}"
                if figure.caption:
                    yield conversation(f"figure-{name}", prompts.caption(title, before), figure.caption)
                    elsewhere = [other for page, other in every if page != document.name]
                    yield from _choice(name, title, before, figure, elsewhere, encode)
                    before[-1] = Placed(line, [(Picture(name, encode(figure.image)), figure.caption)])


def _choice(
    name: str, title: str, before: list[Placed], figure: Figure, elsewhere: list[Figure], encode: Callable[[Image.Image], bytes]
) -> Iterator[Sample]:
    """A question with four different pictures; none where other pages have too few."""
    shown = [encode(figure.image)]
    for i in sorted(range(len(elsewhere)), key=lambda i: number(f"{name} {i}", 2**48)):
        if len(shown) == len(prompts.OPTIONS):
            break
        other = encode(elsewhere[i].image)
        if other not in shown:
            shown.append(other)
    if len(shown) < len(prompts.OPTIONS):
        return
    at = number(f"{name} place", len(shown))
    shown.insert(at, shown.pop(0))
    candidates = [Picture(f"{name} {i}", data) for i, data in enumerate(shown)]
    yield conversation(f"choose-{name}", prompts.choose(title, before, str(figure.caption), candidates), prompts.OPTIONS[at])


def _placed(document: Document) -> tuple[str, list[tuple[str, list[Figure]]]]:
    """Title and lines, each with the figures that follow it, up to `WORDS` words."""
    title, placed, words = document.paragraphs[0], [], 0
    for element in document.elements[1:]:
        if isinstance(element, str):
            words += len(element.split())
            if words > WORDS:
                break
            placed.append((element, []))
        elif placed:
            placed[-1][1].append(element)
    return title, placed


def _shorten(lines: Sequence[str]) -> str:
    return " ".join(" ".join(lines).split()[:WORDS])


def conversation(key: str, asked: Parts, answer: str) -> Sample:
    """One question and its answer in the layout of the official fine-tuning data."""
    pictures = [part for part in asked if isinstance(part, Picture)]
    words = "".join(PLACEHOLDER if isinstance(part, Picture) else part.replace(PLACEHOLDER, "") for part in asked)
    turns = [{"from": "user", "value": words}, {"from": "assistant", "value": answer.replace(PLACEHOLDER, "")}]
    members = {f"{i}.webp": picture.data for i, picture in enumerate(pictures)}
    return {"__key__": key, "json": json.dumps({"conversations": turns}, ensure_ascii=False), **members}


def number(name: str, below: int) -> int:
    """A fixed number in [0, below) that belongs to a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") % below


def webp(image: Image.Image) -> bytes:
    """As all pictures here are stored."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()

"""How well a model takes the steps of composition, asked about documents whose authors took them.

Invariant: the questions are those of an article (compose/article.py); what the author did is the right answer, wrong ones come from other
documents by the hash of the place's name, and a place whose question does not fit the context is counted, not asked.

A document's first text is its title. A text of at most `prompts.CAPTION_CHARACTERS` characters, in one line, right behind a picture is
that picture's caption; every other text is a line. A picture belongs to the line before it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compose import prompts
from compose.article import ask_for_lines, longest
from compose.assistant import Assistant, Parts, ask
from compose.pictures import Picture
from compose.prompts import Placed
from data_pipeline.errors import UserError
from data_pipeline.read.images import decode
from data_pipeline.read.storage import ShardReader, elements_of
from data_pipeline.samples import BadSample, Element, ImageElement, Kind, TextElement
from data_pipeline.shards.source import ShardSource
from train.evaluate import Scorer

LINES = 24
"""Lines of a document that are used, from its beginning."""
PLACES = 3
"""Pictures of a document that are asked about, the first ones, so that long documents do not count for all."""
OPTIONS = len(prompts.OPTIONS)


@dataclass
class Page:
    """A document as the steps of composition see it."""

    name: str
    title: str
    lines: list[str] = field(default_factory=list)
    figures: dict[int, list[Picture]] = field(default_factory=dict)
    """By the line that they follow; captions where there are any."""


class Place(NamedTuple):
    """A picture with a caption, and the line that it follows."""

    page: Page
    line: int
    picture: Picture

    @property
    def name(self) -> str:
        """Of the page and the line."""
        return f"{self.page.name}-{self.line}"

    def before(self) -> list[Placed]:
        """The lines up to the place, with the pictures that stand before it."""
        shown = self.page.lines[: self.line + 1]
        found = [[(p, p.caption or "") for p in self.page.figures.get(i, [])[:1]] for i in range(self.line)]
        return [Placed(line, pictures) for line, pictures in zip(shown, [*found, []], strict=True)]


@dataclass
class Hits:
    """Answers that were right or not, and the pages that they are about: those of one page share lines and errors."""

    right: list[bool] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)

    def add(self, place: Place, right: bool) -> None:
        """One more answer."""
        self.right.append(right)
        self.pages.append(place.page.name)


@dataclass(frozen=True)
class Found:
    """What a model did, by step."""

    lines: np.ndarray
    """F1 of the lines that it chose, or that the rule took where its answer was not as asked, by page."""
    evenly: np.ndarray
    """F1 of lines that are spread evenly, which is what an article falls back to."""
    as_asked: np.ndarray
    """Whether its answer needed no rule, by page."""
    captions: Hits
    """Whether the author's caption was likelier than those of three other documents, by place."""
    pictures: Hits
    """Whether it chose the author's picture among those of three other documents, by place."""
    left_out: int
    """Questions that did not fit the context."""


def read(folder: Path) -> list[Page]:
    """The pages of an indexed source of documents that have a picture behind a line.

    Raises:
        UserError: no such source, a picture that does not decode, too few with captions to choose among, or too many that are alike.
    """
    source = ShardSource(folder.name, folder, key="--data")
    if source.kind is not Kind.document:
        raise UserError(f"{folder.absolute()} is a source of kind {source.kind.value} (give one of documents)")
    reader = ShardReader()
    rows = source.kept(0, source.facts.kept)
    pages = []
    for row in map(int, rows):
        try:
            page = _page(source.key(row), elements_of(source.kind, reader.read(source.locate(row))))
            for picture in (picture for behind in page.figures.values() for picture in behind):
                decode(picture.data)
        except BadSample as bad:
            raise UserError(f"{folder.absolute()}: {source.key(row)} cannot be read: {bad} (leave it out, and index again)") from None
        if page.figures:
            pages.append(page)
    pool = _pool(places(pages))
    if len(pool) < OPTIONS:
        raise UserError(f"{folder.absolute()}: fewer than {OPTIONS} documents have a picture with a caption (give a larger source)")
    alike = next((place.page.name for place in places(pages) if len(_others(place, pool)) < OPTIONS - 1), None)
    if alike is not None:
        what = f"too few documents have another picture with another caption than {alike}, or than one another"
        raise UserError(f"{folder.absolute()}: {what} (give a larger source)")
    return pages


def places(pages: Sequence[Page]) -> list[Place]:
    """The places that are asked about: the first picture behind a line, where it has a caption."""
    return [
        place
        for page in pages
        for place in [Place(page, line, found[0]) for line, found in sorted(page.figures.items()) if found[0].caption][:PLACES]
    ]


def measure(assistant: Assistant, scorer: Scorer, pages: Sequence[Page]) -> Found:
    """Asks about all pages."""
    f1, evenly, as_asked = [], [], []
    left_out = 0
    for page in pages:
        right = sorted(page.figures)
        asked = ask_for_lines(assistant, page.lines, len(right))
        if asked is None:
            left_out += 1
            continue
        *_, chosen = asked
        f1.append(_f1(chosen.value, right))
        evenly.append(_f1(prompts.spread(len(page.lines), len(right)), right))
        as_asked.append(chosen.fallback is None)
    captions, pictures = Hits(), Hits()
    pool = _pool(places(pages))
    for place in places(pages):
        options = [place.picture, *_others(place, pool)]
        asked = longest(assistant, place.before(), lambda before, place=place: prompts.caption(place.page.title, before))
        if asked is None:
            left_out += 1
        else:
            captions.add(place, _caption_is_likeliest(assistant, scorer, asked, [str(o.caption) for o in options]))
        order = sorted(options, key=lambda o, place=place: _hash(place.name, "order", o.digest))
        parts = longest(assistant, place.before(), lambda before, place=place, order=order: _choose(place, before, order))
        if parts is None:
            left_out += 1
        else:
            pictures.add(place, order[assistant.likeliest(ask(*parts), prompts.OPTIONS)] is place.picture)
    return Found(np.asarray(f1), np.asarray(evenly), np.asarray(as_asked), captions, pictures, left_out)


def _choose(place: Place, before: Sequence[Placed], order: Sequence[Picture]) -> Parts:
    return prompts.choose(place.page.title, before, str(place.picture.caption), order)


def _caption_is_likeliest(assistant: Assistant, scorer: Scorer, asked: Parts, captions: Sequence[str]) -> bool:
    """By the mean over tokens: captions differ in length far more than in fit."""
    scores = scorer.score([assistant.spoken(ask(*asked), caption) for caption in captions])
    means = scores.nll / scores.tokens
    return bool((means[0] < means[1:]).all())


def _f1(chosen: Sequence[int], right: Sequence[int]) -> float:
    return 2 * len(set(chosen) & set(right)) / (len(chosen) + len(right))


def _pool(found: Sequence[Place]) -> dict[str, Picture]:
    """A captioned picture of each page, by the page's name."""
    return {place.page.name: place.picture for place in reversed(found)}


def _others(place: Place, pool: dict[str, Picture]) -> list[Picture]:
    """Pictures of three other pages; none of the four is the same picture as another or has the same caption."""
    chosen = [place.picture]
    for name in sorted((name for name in pool if name != place.page.name), key=lambda name: _hash(place.name, "other", name)):
        other = pool[name]
        if all(other.digest != one.digest and other.caption != one.caption for one in chosen):
            chosen.append(other)
        if len(chosen) == OPTIONS:
            break
    return chosen[1:]


def _page(name: str, elements: Sequence[Element]) -> Page:
    texts = [i for i, e in enumerate(elements) if isinstance(e, TextElement)]
    page = Page(name, elements[texts[0]].text)
    for number, element in enumerate(elements[texts[0] + 1 :], texts[0] + 1):
        behind_picture = isinstance(elements[number - 1], ImageElement)
        if isinstance(element, TextElement):
            if behind_picture and _is_caption(element.text):
                continue
            if len(page.lines) == LINES:
                break
            page.lines.append(element.text)
        elif isinstance(element, ImageElement) and page.lines:
            following = elements[number + 1] if number + 1 < len(elements) else None
            caption = following.text if isinstance(following, TextElement) and _is_caption(following.text) else None
            page.figures.setdefault(len(page.lines) - 1, []).append(Picture(f"{name} {number}", element.data, caption))
    return page


def _is_caption(text: str) -> bool:
    return len(text) <= prompts.CAPTION_CHARACTERS and "\n" not in text.strip()


def _hash(*names: str) -> bytes:
    return hashlib.sha256("/".join(names).encode()).digest()

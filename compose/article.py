"""Free-form text-image composition in the paper's five steps: write, choose lines, caption, retrieve, choose.

Invariant: every question that the model was asked stands in the record with its answer, what was made of it, and why where that is not
what the model said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compose import prompts
from compose.assistant import Assistant, Parts, Said, ask
from compose.pictures import Picture
from compose.prompts import Placed, Read
from train.generate import GREEDY, Sampling

CANDIDATES = 4
"""Retrieved for each place (paper: 4)."""
SHORT_ANSWER = 48
"""Longest answer, in tokens, of every step but the first; that of lines is longer where many are asked for."""
MARK_TOKENS = 8
"""Of a line's mark and what parts it from the next."""
SHOWN_WORDS = (None, 40, 20, 10, 5)
"""Words of each line that are shown for the choice of lines: the most that fit."""

Finder = Callable[[str, set[str]], list[Picture]]
"""At most `CANDIDATES` pictures for a caption, the best first, none with a digest of the set."""


@dataclass(frozen=True)
class Step:
    """One question to the model or to the collection."""

    step: str
    """write, choose lines, caption, retrieve or choose."""
    prompt: str
    answer: str
    """As the model wrote it; of a retrieval the names that were found."""
    used: Any
    """What was made of the answer."""
    line: int | None = None
    """The place that it is about: after this line."""
    fallback: str | None = None
    candidates: tuple[Picture, ...] = ()


@dataclass
class Article:
    """An article and how it came about."""

    instruction: str
    title: str = ""
    lines: list[str] = field(default_factory=list)
    pictures: dict[int, tuple[Picture, str]] = field(default_factory=dict)
    """By line: the picture that follows it, and its caption."""
    steps: list[Step] = field(default_factory=list)

    def before(self, line: int) -> list[Placed]:
        """The lines up to and with `line`, with the pictures chosen so far."""
        return [Placed(text, [self.pictures[i]] if i in self.pictures else []) for i, text in enumerate(self.lines[: line + 1])]


def compose(
    assistant: Assistant,
    instruction: str,
    references: Sequence[Picture],
    find: Finder | None,
    most: int,
    max_tokens: int,
    sampling: Sampling,
    tell: Callable[[str], None] = lambda words: None,
) -> Article:
    """Writes an article and gives it at most `most` pictures.

    Args:
        assistant: the model.
        instruction: what to write about.
        references: pictures that the model sees while it writes.
        find: where its pictures come from; None = an article without pictures.
        most: pictures at most.
        max_tokens: longest text.
        sampling: how the text is drawn; every choice after it is greedy.
        tell: hears what is being done: a text takes minutes on a CPU.

    Raises:
        UserError: the instruction does not fit the model.
    """
    article = Article(instruction)
    tell(f"writing, {max_tokens} tokens at most")
    _write(assistant, article, references, max_tokens, sampling)
    if find is None:
        return article
    tell(f"choosing places for pictures in {len(article.lines)} paragraphs")
    places = _choose_lines(assistant, article, most)
    for number, line in enumerate(places, 1):
        words = _caption(assistant, article, line)
        tell(f"picture {number} of {len(places)}: {words}")
        used = {picture.digest for picture, _ in article.pictures.values()}
        candidates = find(words, used)[:CANDIDATES]
        names = [f"{c.name}: {c.caption}" if c.caption else c.name for c in candidates]
        nothing = None if candidates else "found none that is still there and not used yet; left the line without a picture"
        article.steps.append(Step("retrieve", words, "\n".join(names), len(candidates), line, nothing, tuple(candidates)))
        if candidates:
            article.pictures[line] = candidates[_choose(assistant, article, line, words, candidates)], words
    return article


def _write(assistant: Assistant, article: Article, references: Sequence[Picture], max_tokens: int, sampling: Sampling) -> None:
    parts = prompts.write(article.instruction, references)
    said = assistant.answer(ask(*parts), max_tokens, sampling)
    text, fallback = prompts.read_article(said.text, article.instruction, said.whole)
    article.title, article.lines = text
    _note(article, "write", parts, said, Read(text._asdict(), fallback), None)


def _choose_lines(assistant: Assistant, article: Article, most: int) -> list[int]:
    most = min(most, len(article.lines))
    asked = ask_for_lines(assistant, article.lines, most)
    if asked is None:
        read = Read(prompts.spread(len(article.lines), most), "the lines do not fit the model's context; spread evenly over the lines")
        return _note(article, "choose lines", prompts.choose_lines(article.lines, most, SHOWN_WORDS[-1]), None, read, None)
    return _note(article, "choose lines", *asked, None)


def ask_for_lines(assistant: Assistant, lines: Sequence[str], most: int) -> tuple[Parts, Said, Read] | None:
    """Asks for lines that a picture fits, showing as much of each line as fits the context; None where nothing does."""
    longest_answer = max(SHORT_ANSWER, MARK_TOKENS * most)
    for room in (longest_answer, SHORT_ANSWER):
        for words in SHOWN_WORDS:
            parts = prompts.choose_lines(lines, most, words)
            if assistant.fits(ask(*parts), room):
                said = assistant.answer(ask(*parts), longest_answer, GREEDY)
                return parts, said, prompts.read_lines(said.text, len(lines), most, said.whole)
    return None


def _caption(assistant: Assistant, article: Article, line: int) -> str:
    parts = longest(assistant, article.before(line), lambda before: prompts.caption(article.title, before))
    if parts is None:
        read = Read(article.lines[line][: prompts.CAPTION_CHARACTERS], "the line does not fit the model's context; took the line itself")
        return _note(article, "caption", prompts.caption(article.title, []), None, read, line)
    said = _answer(assistant, parts)
    return _note(article, "caption", parts, said, prompts.read_caption(said.text, article.lines[line], said.whole), line)


def _choose(assistant: Assistant, article: Article, line: int, words: str, candidates: Sequence[Picture]) -> int:
    """Number of the candidate. Where not all of them fit the context, the nearest by caption that do are shown."""
    for count in range(len(candidates), 1, -1):
        shown = candidates[:count]
        parts = longest(assistant, article.before(line), lambda before, shown=shown: prompts.choose(article.title, before, words, shown))
        if parts is None:
            continue
        said = _answer(assistant, parts)
        read = prompts.read_choice(said.text, count)
        if read.value is None:
            read = Read(assistant.likeliest(ask(*parts), prompts.OPTIONS[:count]), read.fallback)
        left_out = f"only {count} of {len(candidates)} candidates fit the model's context" if count < len(candidates) else None
        remarks = "; ".join(filter(None, (left_out, read.fallback)))
        return _note(article, "choose", parts, said, Read(read.value, remarks or None), line, shown)
    why = "there was no other" if len(candidates) == 1 else "two pictures do not fit the model's context; took the nearest by caption"
    return _note(article, "choose", [], None, Read(0, why), line, candidates)


def longest(assistant: Assistant, before: Sequence[Placed], make: Callable[[Sequence[Placed]], Parts]) -> Parts | None:
    """The prompt over as many of the lines before a place as fit, the nearest ones; None where not even one does."""
    for first in range(len(before)):
        parts = make(before[first:])
        if assistant.fits(ask(*parts), SHORT_ANSWER):
            return parts
    return None


def _answer(assistant: Assistant, parts: Parts) -> Said:
    """A short, greedy answer to one question."""
    return assistant.answer(ask(*parts), SHORT_ANSWER, GREEDY)


def _note(article: Article, step: str, parts: Parts, said: Said | None, read: Read, line: int | None, shown: Sequence[Picture] = ()) -> Any:
    """Adds a step to the record; returns what is used."""
    answer = said.text if said else ""
    article.steps.append(Step(step, prompts.as_words(parts), answer, read.value, line, read.fallback, tuple(shown)))
    return read.value

"""The words of the five steps of composition, and how their answers are read.

Invariant: an answer is read strictly; whatever is made of one that does not fit is named, so that nobody takes it for the model's choice.
The paper (arXiv 2401.16420, section 3.3) describes the steps and publishes no English wording: these words are ours, and data for a
composition stage are to be made with the same functions.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from compose.assistant import Parts
from compose.pictures import Picture

OPTIONS = "ABCD"
TITLE_WORDS = 14
TITLE_CHARACTERS = 120
WORD_CHARACTERS = 12
"""A word that is shown of a line counts for at most so many: Chinese and Japanese have no blanks between words."""
CAPTION_CHARACTERS = 200
CUT_OFF = "cut off at the limit of its length"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_MARK = re.compile(r"<Seg(\d+)>")


class Read(NamedTuple):
    """What was made of an answer."""

    value: Any
    fallback: str | None = None
    """Why the answer could not be taken as it is, and what was done instead."""


class Text(NamedTuple):
    """A written article."""

    title: str
    lines: list[str]


class Placed(NamedTuple):
    """A line, and the pictures with their captions that follow it."""

    line: str
    pictures: Sequence[tuple[Picture, str]] = ()


def write(instruction: str, references: Sequence[Picture]) -> Parts:
    """Asks for the article; reference pictures come first."""
    words = f"{instruction}\nWrite this as an article: its title on the first line, then one paragraph a line, without lists or headings."
    return [*references, words]


def read_article(answer: str, instruction: str, whole: bool = True) -> Read:
    """`Text` of an answer: the first line is the title, the other lines are paragraphs. `whole`: the model ended it."""
    remarks = []
    if not whole:
        answer, broken = _without_end(answer)
        remarks.append(CUT_OFF + ("; its last, broken sentence left out" if broken else ""))
    lines = [line.strip().lstrip("#").strip(" *") for line in answer.splitlines()]
    lines = [line for line in lines if line]
    kept = list(dict.fromkeys(lines))
    if len(kept) < len(lines):
        remarks.append(f"left out {len(lines) - len(kept)} lines that were repeated")
    title, lines = (kept[0], kept[1:]) if len(kept) > 1 else (_short(instruction), kept)
    if not kept:
        lines = [instruction.strip()]
        remarks.append("nothing was written; the instruction stands in")
    elif len(kept) == 1:
        lines = _sentences(kept[0])
        remarks.append("written as one line; split into sentences, titled by the instruction")
    elif len(title.split()) > TITLE_WORDS or len(title) > TITLE_CHARACTERS:
        title, lines = _short(instruction), kept
        remarks.append("the first line is too long for a title; titled by the instruction")
    return Read(Text(title, lines), "; ".join(remarks) or None)


def _without_end(text: str) -> tuple[str, bool]:
    """A text without the sentence that it ends in, and whether there was another one; a title alone is no text."""
    *lines, last = text.rstrip().split("\n")
    sentences = _sentences(last)
    if len(sentences) > 1:
        return "\n".join([*lines, last[: last.rindex(sentences[-1])]]), True
    return ("\n".join(lines), True) if len([line for line in lines if line.strip()]) > 1 else (text, False)


def _sentences(line: str) -> list[str]:
    """Of a line; a number ends none, as that of a heading (`14.3. Fractal Explorer`)."""
    found, begin = [], 0
    for end in _SENTENCE_END.finditer(line):
        if not re.fullmatch(r"[\d.\s]*", line[begin : end.start()]):
            found.append(line[begin : end.start()])
            begin = end.end()
    return [sentence for sentence in (*found, line[begin:]) if sentence]


def _short(text: str) -> str:
    text = " ".join(text.split())
    short = " ".join(text.split()[:TITLE_WORDS])[:TITLE_CHARACTERS]
    return short + (" …" if short != text else "")


def choose_lines(lines: Sequence[str], most: int, words: int | None = None) -> Parts:
    """Asks after which lines a picture belongs; of each line `words` words are shown, all by default."""
    characters = words and words * WORD_CHARACTERS
    shown = [" ".join(line.split()[:words])[:characters] for line in lines]
    marked = "\n".join(f"<Seg{i}> {line}" for i, line in enumerate(shown))
    return [f"{marked}\nAfter which of these lines does a picture fit? At most {most}. Answer with their marks alone, or with none."]


def read_lines(answer: str, count: int, most: int, whole: bool = True) -> Read:
    """Line numbers, ascending. `whole`: the model ended the answer."""
    if answer.strip().lower().rstrip(".") == "none":
        return Read([])
    found = sorted({int(n) for n in _MARK.findall(answer) if int(n) < count})
    if whole and re.fullmatch(r"<Seg\d+>(\s*,?\s*<Seg\d+>)*\.?", answer.strip()) and len(set(_MARK.findall(answer))) == len(found) <= most:
        return Read(found)
    if found:
        what = "not marks alone, or lines that are not there, or too many" if whole else CUT_OFF
        return Read(found[:most], f"{what}; took the first {most} valid marks")
    return Read(spread(count, most), "no valid mark; spread evenly over the lines")


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly."""
    most = min(most, count)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def caption(title: str, before: Sequence[Placed]) -> Parts:
    """Asks for the caption of a picture that follows the last line of `before`."""
    shown = [part for placed in before for part in (placed.line, *(f"[picture: {words}]" for _, words in placed.pictures))]
    text = "\n".join([title, *shown])
    return [f"{text}\nA picture follows here. Write its caption in one short sentence, and nothing else."]


def read_caption(answer: str, line: str, whole: bool = True) -> Read:
    """One line of at most `CAPTION_CHARACTERS`. `whole`: the model ended it."""
    lines = [found.strip().strip("\"'“”") for found in answer.splitlines() if found.strip()]
    if len(lines) == 1 and 0 < len(lines[0]) <= CAPTION_CHARACTERS:
        return Read(lines[0], None if whole else CUT_OFF)
    if lines and lines[0]:
        return Read(lines[0][:CAPTION_CHARACTERS], "more than one short line; took the beginning of the first")
    return Read(line[:CAPTION_CHARACTERS], "nothing was written; took the line before it")


def choose(title: str, before: Sequence[Placed], words: str, candidates: Sequence[Picture]) -> Parts:
    """Asks which candidate fits, behind the text so far with the pictures that it has."""
    parts: list[str | Picture] = [title + "\n"]
    for placed in before:
        parts.append(placed.line + "\n")
        for picture, _ in placed.pictures:
            parts += [picture, "\n"]
    parts.append(f'Which picture fits here, for the caption "{words}"?\n')
    for letter, picture in zip(OPTIONS, candidates, strict=False):
        parts += [f"{letter}. ", picture, "\n"]
    parts.append("Answer with one letter.")
    return parts


def letter(question: str, options: Sequence[str]) -> str:
    """Asks which of some lettered options is right."""
    lettered = "\n".join(f"{name}. {option}" for name, option in zip(ascii_uppercase, options, strict=False))
    return f"{question}\n{lettered}\nAnswer with one letter."


def read_choice(answer: str, count: int) -> Read:
    """Number of the candidate; None where the answer is no letter."""
    letter = answer.strip().rstrip(".").upper()
    if len(letter) == 1 and letter in OPTIONS[:count]:
        return Read(OPTIONS.index(letter))
    return Read(None, "no letter alone; took the option whose letter was likeliest to begin the answer")


def as_words(parts: Parts) -> str:
    """A prompt as a person reads it."""
    return "".join(f"<picture: {part.name}>" if isinstance(part, Picture) else part for part in parts)

"""An article as a page and as a record: `article.html` to read, `article.json` with every step.

Invariant: the page loads nothing, treats all words as text, and, like the record, appears whole or not at all; neither replaces a file.
"""

import os
from pathlib import Path
from typing import Any

from compose.article import Article, Step
from compose.pictures import Picture, data_uri
from compose.prompts import OPTIONS
from data_pipeline.errors import UserError
from data_pipeline.inspect import page
from train.run_dir import write_json

SIDE = 1400
"""Longest side of a picture on the page, in pixels."""
THUMB = 240
"""The same of a candidate."""


def check_output(output: Path) -> Path:
    """The record's file, for a page in `output`.

    Raises:
        UserError: one of them exists, or cannot be written there.
    """
    if output.is_dir():
        raise UserError(f"-o {output} is a folder (give the page's name, such as {output / 'article.html'})")
    record = output.with_suffix(".json")
    if record == output:
        raise UserError(f"-o {output}: the record goes there (give the page's name, such as {output.with_suffix('.html')})")
    require_writable(output, record)
    return record


def require_writable(*files: Path) -> None:
    """Refuses, before minutes of work, files that there are, and where none can be made.

    Raises:
        UserError: as said.
    """
    for file in files:
        if os.path.lexists(file):
            raise UserError(f"{file.absolute()} exists (choose another -o, or remove it)")
        if not file.absolute().parent.is_dir():
            raise UserError(f"no folder {file.absolute().parent} (make it, or choose another -o)")
        try:
            file.touch(exist_ok=False)
            file.unlink()
        except OSError as error:
            raise UserError(f"cannot write {file.absolute()}: {error.strerror} (choose another -o)") from None


def write(article: Article, facts: dict[str, Any], output: Path, record: Path) -> None:
    """Writes the record, then the page.

    Raises:
        UserError: a file cannot be written.
    """
    html = render(article, facts)
    try:
        write_json(record, as_record(article, facts))
    except OSError as error:
        raise UserError(f"cannot write {record.absolute()}: {error.strerror} (choose another -o)") from None
    page.write(html, output)


def as_record(article: Article, facts: dict[str, Any]) -> dict[str, Any]:
    """The article and its steps as plain values; pictures by name and digest."""
    steps = [
        {
            "step": step.step,
            **({} if step.line is None else {"line": step.line}),
            "prompt": step.prompt,
            "answer": step.answer,
            "used": step.used,
            "fallback": step.fallback,
            **({"candidates": [_named(c) for c in step.candidates]} if step.candidates else {}),
        }
        for step in article.steps
    ]
    pictures = [{"after_line": i, "caption": words, **_named(picture)} for i, (picture, words) in sorted(article.pictures.items())]
    text = {"title": article.title, "lines": article.lines, "pictures": pictures}
    return {"instruction": article.instruction, "made_with": facts, "article": text, "steps": steps}


def render(article: Article, facts: dict[str, Any]) -> str:
    """The page."""
    figures = {i: {"src": data_uri(p, SIDE), "caption": words, "name": p.name} for i, (p, words) in article.pictures.items()}
    return page.render(
        "article.html",
        "compose",
        article=article,
        figures=figures,
        facts=facts,
        questions=[_question(step) for step in article.steps if step.step != "retrieve" or step.fallback],
        remarks=sum(step.fallback is not None for step in article.steps),
    )


def _question(step: Step) -> dict[str, Any]:
    shown = [
        {"letter": letter, "src": data_uri(c, THUMB), "name": c.name, "chosen": step.used == i}
        for i, (letter, c) in enumerate(zip(OPTIONS, step.candidates, strict=False))
    ]
    where = "" if step.line is None else f" after paragraph {step.line + 1}"
    return {"title": step.step + where, "prompt": step.prompt, "answer": step.answer, "fallback": step.fallback, "shown": shown}


def _named(picture: Picture) -> dict[str, Any]:
    return {"name": picture.name, "known_as": picture.caption, "sha256": picture.digest}

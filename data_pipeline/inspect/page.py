"""The self-contained pages of this room: how they are rendered and written.

Invariant: a page loads nothing, treats all data as text, and appears whole or not at all.
"""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2

from data_pipeline.config import DataConfig
from data_pipeline.errors import UserError
from data_pipeline.inspect.packs import PackView
from data_pipeline.inspect.patterns import patterns
from data_pipeline.opened import Data


def render(template: str, package: str = "data_pipeline.inspect", **values: Any) -> str:
    """A page whose template lies in a package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def render_packs(
    title: str, facts: Sequence[tuple[str, str]], section: DataConfig, data: Data, packs: Sequence[PackView], key: str | None = None
) -> str:
    """The page of some packs; `facts` are (name, value) of its head, cards of the sample `key` are marked."""
    shares = [{"name": source.name, "segments": 0, "tokens": 0} for source in data.sources]
    for card in (card for pack in packs for card in pack.cards):
        shares[card.source]["segments"] += 1
        shares[card.source]["tokens"] += card.tokens
    return render(
        "packs.html",
        title=title,
        facts=facts,
        section=section,
        digest=data.plan.digest,
        shares=shares,
        total=max(1, sum(s["tokens"] for s in shares)),
        patterns=patterns(packs),
        packs=packs,
        key=key,
    )


def write(page: str, output: Path) -> None:
    """Puts the page in place.

    Raises:
        UserError: the file cannot be written.
    """
    beside = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        beside.replace(output)
    except OSError as error:
        with suppress(OSError):  # a read-only file system refuses to remove even what is not there
            beside.unlink()
        raise UserError(f"cannot write {output.resolve()}: {error.strerror} (choose another file: --output)") from None

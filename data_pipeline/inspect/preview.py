"""`xc-data preview`: the first packs of a run, or those in which a sample is first drawn, as one page.

Invariant: the packs are the plan's own; a run with this config trains on them as they are shown.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.configure import load_data_view
from data_pipeline.errors import UserError
from data_pipeline.inspect import page
from data_pipeline.inspect.packs import Viewer, walk
from data_pipeline.opened import Data, open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.plan.split import Pieces
from data_pipeline.read.materialise import Materialiser


def write_preview(config: Path, overrides: list[str], packs: int, key: str | None, output: Path) -> None:
    """Writes the page: `packs` packs from the start of the run, or those that hold the first draw of the sample `key`.

    Raises:
        UserError: the config or the data cannot be used, nothing is to be shown, or the page cannot be written.
    """
    if packs < 1:
        raise UserError(f"--packs {packs} shows nothing (ask for at least 1)")
    view = load_data_view(config, overrides)
    data = open_data(view.data, view.run.seed, view.train.steps)
    viewer = Viewer(Materialiser(data.sources, data.tokenizer, view.data.images, view.run.seed))
    chosen = list(_with_sample(data, key)) if key is not None else islice(walk(data.plan, Cursor(0, 0)), packs)
    shown = [pack for at, pieces in chosen for pack in viewer.view([pieces], [at])[1]]
    facts = [("seed", str(view.run.seed))]
    page.write(page.render_packs(config.name, facts, view.data, data, shown, key), output)


def _with_sample(data: Data, key: str) -> Iterator[tuple[Cursor, Pieces]]:
    """The packs that hold the first draw of the sample with this key, in every source that has it."""
    found = [(number, row) for number, source in enumerate(data.sources) for row in source.find(key)]
    if not found:
        names = ", ".join(source.name for source in data.sources)
        raise UserError(f"--key {key!r}: no sample of {names} has this key (xc-data preview without --key shows some)")
    drawn = [(number, row, window) for number, row in found if (window := data.plan.first_window(number, row)) is not None]
    if not drawn:
        raise UserError(f"--key {key!r}: the sample is never drawn (its source has no weight, or the index left it out: xc-data stats)")
    for number, row, w in drawn:
        window = data.plan.window(w)
        pieces = window.pieces
        mine = np.flatnonzero((pieces.source == number) & (pieces.row == row))
        of_first_draw = mine[pieces.epoch[mine] == pieces.epoch[mine].min()]
        for pack in np.unique(np.searchsorted(window.pack_starts, of_first_draw, "right") - 1).tolist():
            yield Cursor(w, pack), window.pack(pack)

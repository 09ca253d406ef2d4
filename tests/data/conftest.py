"""Fixtures of the tests of the data room."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def xc_import(xc_data: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `xc-data import`; returns what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        assert xc_data("import", *arguments) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of pictures: coco/0.png, ..."""
    from imports import PICTURES

    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    for i, picture in enumerate(PICTURES):
        (folder / "coco" / f"{i}.png").write_bytes(picture)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The only shard of a source, which a test may damage: PAIRS good pairs."""
    from indexing import write_pairs

    return write_pairs(tmp_path / "source")

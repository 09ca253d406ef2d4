"""Fixtures of composition: a finished run and a collection."""

from pathlib import Path
from typing import Any

import pytest
from finished_run import write_run


@pytest.fixture(scope="session")
def run_dir(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(demo, tmp_path_factory.mktemp("runs") / "sft")


@pytest.fixture(scope="session")
def collection(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out emoji of one half, with their captions."""
    from compose.collection import build

    folder = tmp_path_factory.mktemp("collections") / "emoji"
    build(demo.source("heldout/unseen_picture/test"), folder)
    return folder

"""Fixtures that all tests share: the demo data, indexed outside the repository.

Invariant: no test writes into the repository, and nothing here imports torch: a test that needs none should start at once.
"""

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Streams of tests share the cores: two threads that wait for each other cost several times what one does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported
settings.register_profile("any pace", deadline=None)
settings.load_profile("any pace")

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
DEMO_SOURCES = ("pairs", "documents", "text", "prose")
HELD_OUT = ("heldout/text", *(f"heldout/unseen_{what}/{part}" for what in ("picture", "concept") for part in ("validation", "test")))


def pytest_collection_finish() -> None:
    """What is imported stays: later collections need not look at it."""
    gc.freeze()
    gc.enable()


@dataclass(frozen=True)
class Demo:
    """The demo data, indexed and merged."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.root / "tokenizer"

    def source(self, name: str) -> Path:
        """Folder of a source: pairs, documents, text or one below heldout."""
        return self.root / name

    def copy(self, name: str, to: Path) -> Path:
        """A source with its index that a test may damage."""
        return Path(shutil.copytree(self.root / name, to))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Where ranks of tests run: one thread each, the extensions that `make install` compiled."""
    from train.extensions import prepare_deepspeed

    prepare_deepspeed()
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture(scope="session")
def xc_data() -> Callable[..., int]:
    """Runs an `xc-data` command in this process; returns its exit code."""
    from data_pipeline.cli import main

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        return int(ended.value.code or 0)

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, xc_data: Callable[..., int]) -> Demo:
    """examples/demo, copied and indexed through the command line."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(DEMO / "tokenizer", root / "tokenizer")
    for name in (*DEMO_SOURCES, *HELD_OUT):
        (root / name).mkdir(parents=True)
        for file in [*(DEMO / name).glob("*.tar"), *(DEMO / name).glob("candidates.json")]:
            shutil.copy(file, root / name)
        assert xc_data("index", root / name, "--tokenizer", root / "tokenizer") == 0
        assert xc_data("merge", root / name) == 0
    return Demo(root)

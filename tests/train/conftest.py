"""Fixtures that start real training runs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, make_stage

from data_pipeline.errors import EXIT_DONE
from train.run_dir import RunDir


@pytest.fixture
def stage(demo: Any, environment: dict[str, str], tmp_path: Path) -> Callable[..., Stage]:
    """Writes a stage's YAML; keyword arguments replace whole sections' keys (`train={"steps": 3}`)."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Stage:
        return make_stage(demo, environment, tmp_path / name, sections)

    return make


@pytest.fixture(scope="session")
def whole(demo: Any, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run that nothing interrupted, by the command: what interrupted ones are compared with. Tests copy it before they touch it."""
    cadence = {"checkpoint": {"keep_last": 100}, "profile": {"steps": [5, 6]}, "track": {"every": 3, "tensorboard": True, "wandb": True}}
    made = make_stage(demo, environment, tmp_path_factory.mktemp("whole") / "run", cadence)
    done = made.train()
    assert done.returncode == EXIT_DONE, done.stderr
    return made


@pytest.fixture
def continued(whole: Stage, stage: Callable[..., Stage]) -> Callable[..., Stage]:
    """A copy of `whole` as if it had been killed after the checkpoint of a step; keyword arguments as those of `stage`."""

    def make(name: str, step: int, **sections: dict[str, Any]) -> Stage:
        made = stage(name, **sections)
        shutil.copytree(whole.run.path, made.run.path)
        made.forget_after(step)
        return made

    return make


@pytest.fixture
def run(tmp_path) -> RunDir:
    """An empty run directory."""
    made = RunDir(tmp_path / "run")
    made.create()
    return made

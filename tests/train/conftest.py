"""Fixtures that start real training runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from stages import Stage, stage_settings

from train.run_dir import RunDir


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where ranks of tests run: one thread each, the extensions that `make install` compiled."""
    from train.device import prepare_deepspeed

    prepare_deepspeed()
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture
def stage(demo: Any, environment: dict[str, str], tmp_path: Path) -> Callable[..., Stage]:
    """Writes a stage's YAML; keyword arguments replace whole sections' keys (`train={"steps": 3}`)."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Stage:
        settings = stage_settings(demo, tmp_path / name)
        for section, changes in sections.items():
            settings.setdefault(section, {}).update(changes)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return Stage(config, RunDir(tmp_path / name), environment)

    return make

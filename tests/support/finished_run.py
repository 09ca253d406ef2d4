"""A finished run directory with a fresh model of test size: no rank is started."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from stages import stage_settings

from train import configure
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir
from train.weights import final

if TYPE_CHECKING:
    from conftest import Demo


def write_run(demo: "Demo", folder: Path, stage: str = "sft", vision: dict[str, Any] | None = None, **data: Any) -> Path:
    """A run directory as `xc-train run` leaves it, as far as its weights go."""
    settings = stage_settings(demo, folder)
    settings["run"]["stage"] = stage
    settings["data"].update({"context": 512, "images": {"size": 32, "tokens": 1}, **data})
    settings["model"]["vision"] = vision or settings["model"]["vision"]
    run = RunDir(folder)
    run.create()
    run.config.write_text(yaml.safe_dump(settings))
    config = configure.read_resolved(folder)
    config.model.decoder.init_std = 0.3  # decided opinions, so that an argmax is not a coin toss
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    model.init_weights(1)
    final.write(run, {name: parameter.detach() for name, parameter in model.named_parameters()}, 1)
    return folder

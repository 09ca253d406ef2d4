"""`stage.yaml` of an export: what a stage's config says of the model and its inputs, which the official config.json has no place for.

Invariant: no path of the machine that trained is in it, and whoever reads it back gets the same model, number format and pictures.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from data_pipeline import configure
from data_pipeline.config import DataConfig, ImageConfig
from data_pipeline.errors import UserError
from train.config import Config, Precision, RunConfig, Stage, TrainConfig
from train.model_config import ModelConfig

FILE = "stage.yaml"


@dataclass
class _Run:
    name: str = MISSING
    stage: Stage = MISSING


@dataclass
class _Data:
    context: int = MISSING
    images: ImageConfig = field(default_factory=ImageConfig)


@dataclass
class _Train:
    precision: Precision = Precision.auto


@dataclass
class _Exported:
    """The keys of a stage that are exported."""

    run: _Run = field(default_factory=_Run)
    data: _Data = field(default_factory=_Data)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: _Train = field(default_factory=_Train)


def to_yaml(config: Config) -> str:
    """The content of `stage.yaml`."""
    kept = _Exported(
        _Run(config.run.name, config.run.stage),
        _Data(config.data.context, config.data.images),
        config.model,
        _Train(config.train.precision),
    )
    tree = OmegaConf.structured(kept)
    tree.model.decoder.weights = tree.model.vision.weights = None
    return OmegaConf.to_yaml(tree)


def is_export(folder: Path) -> bool:
    """Whether `xc-train export` wrote the folder."""
    return (folder / FILE).exists()


def read(folder: Path) -> Config:
    """The stage of an export, as far as it was exported, with the export's own weights and tokenizer.

    Raises:
        UserError: `stage.yaml` says what no export says.
    """
    file = folder / FILE
    found = configure.load(_Exported, file)
    vision = found.model.vision
    if ":" in vision.name or any(key.startswith(("pretrained", "checkpoint", "cache")) for key in vision.overrides):
        raise UserError(f"{file}: model.vision names other weights than those of the folder (export the run again)")
    return Config(
        run=RunConfig(found.run.name, str(folder), found.run.stage, init_from=str(folder)),
        data=DataConfig(tokenizer=str(folder), context=found.data.context, images=found.data.images),
        model=found.model,
        train=TrainConfig(precision=found.train.precision),
    )

"""A trained model read back from wherever its weights lie: a run, one of its checkpoints, or an export.

Invariant: whichever it is, the model has those weights bit for bit, in the number format that the stage's config means on this machine.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import UserError
from data_pipeline.text.tokenizer import Tokenizer
from train import configure
from train.config import Config
from train.device import choose
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir, file_digest, read_json
from train.weights import exported, final, initial


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked, in evaluation mode on its device."""

    model: XComposer2
    config: Config
    """Of the stage; of an export the part that was exported, the rest is defaults."""
    tokenizer: Tokenizer
    weights: str
    """Their digest."""
    step: int | None
    """Of the weights; an export does not know it."""
    dtype: torch.dtype


def open_model(path: Path) -> Opened:
    """The model of a run directory, of RUN/checkpoints/step-N, or of a folder that `xc-train export` wrote.

    Raises:
        UserError: none of these, or its weights are not there, not whole or not this model's.
    """
    path = path.absolute()
    if exported.is_export(path):
        return _begun(exported.read(path), str(initial.fingerprint(path)))
    if path.parent.name == "checkpoints":
        return _of_checkpoint(path)
    return of_run(_run_of(path))


def read_config(path: Path) -> Config:
    """What `open_model` would put into `Opened.config`; no weights are looked for.

    Raises:
        UserError: no run directory, none of its checkpoints, and no export.
    """
    path = path.absolute()
    return exported.read(path) if exported.is_export(path) else configure.read_resolved(_run_of(path))


def require_weights(path: Path) -> None:
    """Refuses a run that has not ended, before anything large is read.

    Raises:
        UserError: it has no final weights.
    """
    if not exported.is_export(path) and path.absolute().parent.name != "checkpoints":
        final.digest(_run_of(path.absolute()))


def _run_of(path: Path) -> Path:
    if path.parent.name == "checkpoints":
        return path.parents[1]
    run = path.parent if path.name == RunDir(path).final.name and not RunDir(path).config.exists() else path
    if not RunDir(run).config.exists():
        cure = "give a run directory, RUN/checkpoints/step-N, or a folder that xc-train export wrote"
        raise UserError(f"{run} is no run directory and no export: neither config.yaml nor {exported.FILE} in it ({cure})")
    return run


def of_run(run_dir: Path) -> Opened:
    """The final weights of a run.

    Raises:
        UserError: no run directory, or an unfinished one.
    """
    run = RunDir(run_dir)
    config = configure.read_resolved(run.path)
    digest = final.digest(run.path)
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    final.load_into(model, run.path)
    return _ready(model, config, digest, (read_json(run.final / final.MANIFEST) or {}).get("step"))


def first_weights(config: Config) -> Opened:
    """The weights that a stage begins from.

    Raises:
        UserError: they are not there, or do not fit.
    """
    return _begun(config, initial.digest(config) or "fresh")


def _begun(config: Config, digest: str) -> Opened:
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    initial.fill(model, config)
    return _ready(model, config, digest, None)


def _of_checkpoint(folder: Path) -> Opened:
    from train.extensions import prepare_deepspeed

    config = read_config(folder)
    prepare_deepspeed()
    from train.weights.checkpointed import Trained  # imports DeepSpeed, which only checkpoints need

    trained = Trained(folder, config)
    return _ready(trained.model, config, file_digest(folder / "manifest.json"), trained.step)


def _ready(model: XComposer2, config: Config, digest: str, step: int | None) -> Opened:
    device = choose(config.train.precision, 0)
    model = model.to(device.torch_device, device.dtype).eval()
    return Opened(model, config, Tokenizer(config.data.tokenizer), digest, step, device.dtype)

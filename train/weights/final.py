"""The weights that a stage leaves for the next one: `RUN/final/`, one safetensors file and its manifest.

Invariant: the folder appears whole, by one rename; the manifest carries the file's digest, so that nobody hashes it again.
"""

import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from data_pipeline.errors import UserError
from train.run_dir import RunDir, file_digest, fsync_tree, read_json
from train.weights.clip import POSITIONS
from train.weights.hub import HubFolder, save
from train.weights.mapping import Entry, Shapes, fits, load

MODEL_FILE = "model.safetensors"
MANIFEST = "manifest.json"


def write(run: RunDir, weights: dict[str, Tensor], step: int) -> None:
    """Writes the final weights of a run."""
    partial = run.final.with_name(".final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save(weights, partial / MODEL_FILE)
    digest = file_digest(partial / MODEL_FILE)
    manifest = {"digest": digest, "step": step, "tensors": len(weights), "parameters": sum(t.numel() for t in weights.values())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    fsync_tree(partial)
    if run.final.exists():
        shutil.rmtree(run.final)
    partial.replace(run.final)


def digest(run_dir: str | Path) -> str:
    """Digest of a run's final weights, from its manifest.

    Raises:
        UserError: the run has no final weights.
    """
    final = RunDir(run_dir).final
    manifest = read_json(final / MANIFEST)
    if not manifest or not (final / MODEL_FILE).exists():
        raise UserError(f"{Path(run_dir).resolve()} has no final weights (finish that stage first: xc-train run its config)")
    return str(manifest["digest"])


def is_run(path: str | Path) -> bool:
    """Whether the folder is a run directory, finished or not."""
    run = RunDir(path)
    return run.config.exists() or run.final.exists()


def entries(shapes: Shapes) -> list[Entry]:
    """Every parameter under its own name; a position table of another image size is resampled."""
    return [Entry(name, {name: shape}, table=name == POSITIONS) for name, shape in shapes.items()]


def load_into(model: nn.Module, run_dir: str | Path) -> None:
    """Fills a model with a run's final weights, each converted to the format of its parameter.

    Raises:
        UserError: no such weights, or they are not this model's: a table of what does not fit.
    """
    digest(run_dir)
    found = HubFolder(RunDir(run_dir).final, "final weights")
    parameters = dict(model.named_parameters())
    wanted = entries({name: tuple(p.shape) for name, p in parameters.items()})
    fits(wanted, found, "final weights")
    load(wanted, found, parameters)

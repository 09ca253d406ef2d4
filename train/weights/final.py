"""The weights that a stage leaves for the next one: `RUN/final/`, one safetensors file and its manifest.

Invariant: the folder appears whole, by one rename; the manifest carries the file's digest, so that nobody hashes it again.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import UserError
from train.run_dir import RunDir, file_digest, fsync_tree, read_json

MODEL_FILE = "model.safetensors"
MANIFEST = "manifest.json"


def write(run: RunDir, weights: dict[str, Tensor], step: int) -> None:
    """Writes the final weights of a run."""
    partial = run.final.with_name(".final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(weights, partial / MODEL_FILE)
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


def load_into(model: nn.Module, run_dir: str | Path) -> None:
    """Fills a model with a run's final weights, each converted to the format of its parameter.

    Raises:
        UserError: no such weights, or they are not this model's: names what is missing, unexpected or wrongly shaped.
    """
    digest(run_dir)
    file = RunDir(run_dir).final / MODEL_FILE
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error} (run that stage again)") from None
    wanted = dict(model.named_parameters())
    problems = [f"missing {n}" for n in wanted if n not in found] + [f"unexpected {n}" for n in found if n not in wanted]
    problems += [
        f"{n} is {tuple(found[n].shape)}, not {tuple(p.shape)}" for n, p in wanted.items() if n in found and found[n].shape != p.shape
    ]
    if problems:
        raise UserError(f"{file} does not fit the model: {'; '.join(problems[:3])} ({len(problems)} in all; use the same model section)")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])

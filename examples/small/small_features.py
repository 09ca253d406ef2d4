"""Measures mean and deviation of the ViT's features over training pictures, and puts them beside its weights (projector.standardise).

Invariant: a pure function of weights, data and config; pictures are spread evenly over the source, and the file appears whole.

    make small-data        (or: python examples/small/small_features.py, behind it)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data_pipeline.opened import open_data
from data_pipeline.read.images import load_square
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import ImageElement
from train import configure
from train.weights.opened import first_weights

CONFIG, SOURCE = Path("configs/small/pretrain.yaml"), "pairs"
PICTURES, AT_ONCE = 1024, 64
MEAN, STD = "features.mean", "features.std"


def main() -> int:
    """Returns the exit code."""
    config = configure.load(CONFIG, ["model.projector.standardise=false", "train.precision=fp32"])
    file = Path(str(config.model.vision.weights)) / "model.safetensors"
    tensors = load_file(file)
    opened = first_weights(config)
    data = open_data(config.data, config.run.seed)
    number = next(i for i, source in enumerate(data.sources) if source.name == SOURCE)
    reader = Materialiser(data.sources, data.tokenizer, config.data.images, config.run.seed)
    kept = data.sources[number].kept(0, data.sources[number].facts.kept)
    rows = kept[:: max(1, len(kept) // PICTURES)][:PICTURES].tolist()
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for first in range(0, len(rows), AT_ONCE):
        elements = [e for row in rows[first : first + AT_ONCE] for e in reader.elements(number, row) if isinstance(e, ImageElement)]
        pictures = [torch.tensor(load_square(element.data, config.data.images, None)) for element in elements]
        with torch.no_grad():
            features_ND = opened.model.vision(torch.stack(pictures)).flatten(0, 1).double()
        count, total, squares = count + len(features_ND), total + features_ND.sum(0), squares + features_ND.square().sum(0)
    mean = total / count
    tensors[MEAN], tensors[STD] = mean.float(), (squares / count - mean.square()).sqrt().float()
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(file)
    constant = float(mean.square().sum() / (squares / count).sum())
    print(f"{file}: features of {len(rows)} pictures measured; {constant:.0%} of their energy is a constant")
    return 0


if __name__ == "__main__":
    sys.exit(main())

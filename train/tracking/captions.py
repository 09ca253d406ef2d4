"""Captions that a model wrote for held-out pictures while it trains, as trackers and the report take them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline import jsonl
from train.run_dir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Caption:
    """One picture and what was written about it."""

    split: str
    key: str
    reference: str
    generated: str
    pixels: np.ndarray
    """[3, H, W] uint8."""


def keep(run: RunDir, step: int, life: int, captions: Sequence[Caption]) -> None:
    """Adds a line to `validation/captions.jsonl`; each picture goes into `validation/pictures.json` once."""
    folder = run.validation
    folder.mkdir(exist_ok=True)
    before = read_json(folder / "pictures.json") or {}
    pictures = {c.key: data_uri(c.pixels) for c in captions if c.key not in before}
    if pictures:
        write_json(folder / "pictures.json", {**before, **pictures})
    written = [{"split": c.split, "key": c.key, "reference": c.reference, "generated": c.generated} for c in captions]
    jsonl.append(folder / "captions.jsonl", [{"step": step, "life": life, "captions": written}])


def data_uri(pixels: np.ndarray) -> str:
    """A picture [3, H, W] uint8 as the source of an `img`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""The benchmark's data: JPEG pictures with captions in plain WebDataset tars, the same for every contestant.

Invariant: the tars are a pure function of the number of pictures and of the versions of numpy and Pillow. Pictures are smooth shapes
with the grain of a photograph, so that their size in bytes is that of one.
"""

import io
import shutil
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

PER_SHARD = 250
QUALITY = 85
GRAIN = 4.0
"""Standard deviation of the grain, in grey levels: it decides the bytes, and so the decoder's work."""
COARSE = 4
"""Pixels along a side of what the smooth part is drawn in."""
WORDS = (
    "amber",
    "brass",
    "cedar",
    "dusk",
    "ember",
    "fern",
    "grain",
    "harbour",
    "iris",
    "jade",
    "kelp",
    "moss",
    "ochre",
    "pine",
    "quartz",
    "tide",
)
TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "demo" / "tokenizer"


def make(folder: Path, pictures: int) -> list[Path]:
    """Writes the shards and what our loader needs beside them, where they are not there yet; returns the shards."""
    shards = [folder / f"shard-{first // PER_SHARD:06d}.tar" for first in range(0, pictures, PER_SHARD)]
    done = folder / ".whole"
    if not done.exists() or done.read_text() != str(pictures):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, shard in enumerate(shards):
            first = number * PER_SHARD
            _write(shard, range(first, min(pictures, first + PER_SHARD)))
        done.write_text(str(pictures))
    return shards


def index(folder: Path) -> None:
    """What `xc-data index` and `xc-data merge` do."""
    from data_pipeline.samples import Kind
    from data_pipeline.shards.index import index_shard, list_shards
    from data_pipeline.shards.merge import merge
    from data_pipeline.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(TOKENIZER)
    for shard in list_shards(folder):
        index_shard(shard, folder, Kind.pair, tokenizer)
    merge(folder, folder)


def picture(number: int) -> bytes:
    """One JPEG of 512 to 1024 pixels on its long edge: colour gradients, discs and grain."""
    rng = np.random.default_rng([7, number])
    long, short = int(rng.integers(512, 1025)), rng.uniform(0.6, 1.0)
    width, height = (long, int(long * short)) if rng.integers(2) else (int(long * short), long)
    y, x = np.mgrid[0 : height // COARSE, 0 : width // COARSE] * (COARSE / long)
    waves, phases = rng.uniform(2, 12, (3, 2)), rng.uniform(0, 6, 3)
    coarse = np.stack([128 + 70 * np.sin(a * x + b * y + phase) for (a, b), phase in zip(waves, phases, strict=True)], -1)
    for _ in range(12):
        centre_x, centre_y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.03, 0.2)
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        coarse[inside] = 0.4 * coarse[inside] + 0.6 * rng.uniform(0, 255, 3)
    smooth = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    left, upper = rng.integers(0, 1024, 2)
    pixels = np.asarray(smooth) + _grain()[upper : upper + height, left : left + width, None]
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


@cache
def _grain() -> np.ndarray:
    return np.rint(GRAIN * np.random.default_rng(13).standard_normal((2048, 2048), np.float32)).astype(np.int16)


def caption(number: int) -> str:
    """A caption of 8 to 30 words."""
    rng = np.random.default_rng([11, number])
    return " ".join(rng.choice(WORDS, int(rng.integers(8, 31))))


def _write(shard: Path, numbers: range) -> None:
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            for extension, data in (("jpg", picture(number)), ("txt", caption(number).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

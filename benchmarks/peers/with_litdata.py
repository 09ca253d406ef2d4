"""litdata, as its documentation sets it up: chunks written once by `optimize`, a StreamingDataset that decodes, its own loader."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
from measure import BATCH, peer
from work import collate, decoded


class Pairs(litdata.StreamingDataset):
    """Pictures and token ids."""

    def __init__(self, folder: Path, decoder: str) -> None:
        super().__init__(str(folder), shuffle=True)
        self.decoder = decoder

    def __getitem__(self, at: Any) -> tuple[Any, list[int]]:
        return decoded(super().__getitem__(at), self.decoder)


def prepare(shards: Path, work: Path) -> None:
    """Copies the tars into litdata's chunks."""
    folder = work / "litdata"
    shutil.rmtree(folder, ignore_errors=True)
    tars = sorted(str(tar) for tar in shards.glob("*.tar"))
    litdata.optimize(fn=_samples, inputs=tars, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    from webdataset import WebDataset

    for sample in WebDataset(tar, shardshuffle=False):
        yield {"image": sample["jpg"], "caption": sample["txt"].decode()}


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    pairs = Pairs(work / "litdata", decoder)
    for images, _ in litdata.StreamingDataLoader(pairs, batch_size=BATCH, num_workers=1, collate_fn=collate):
        yield len(images)


if __name__ == "__main__":
    peer(prepare, batches)

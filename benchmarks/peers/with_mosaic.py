"""mosaicml-streaming, as its documentation sets it up: MDS shards written once, a StreamingDataset that decodes, torch's DataLoader."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import BATCH, peer
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from work import collate, decoded


class Pairs(StreamingDataset):
    """Pictures and token ids."""

    def __init__(self, folder: Path, decoder: str) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=BATCH)
        self.decoder = decoder

    def __getitem__(self, at: Any) -> tuple[Any, list[int]]:
        return decoded(super().__getitem__(at), self.decoder)


def prepare(shards: Path, work: Path) -> None:
    """Copies the tars into MDS shards."""
    from webdataset import WebDataset

    folder = work / "mosaic"
    shutil.rmtree(folder, ignore_errors=True)
    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str"}) as out:
        for sample in WebDataset(sorted(str(tar) for tar in shards.glob("*.tar")), shardshuffle=False):
            out.write({"image": sample["jpg"], "caption": sample["txt"].decode()})


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    pairs = Pairs(work / "mosaic", decoder)
    for images, _ in StreamingDataLoader(pairs, batch_size=BATCH, num_workers=1, collate_fn=collate):
        yield len(images)


if __name__ == "__main__":
    peer(prepare, batches)

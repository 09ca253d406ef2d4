"""Hugging Face directories of weights: safetensors or .bin, one file or shards with an index, read and written tensor by tensor.

Invariant: a folder is untrusted. Nothing of it is executed (safetensors, or torch's `weights_only` reader), no name in it leads out of
it, and what it holds is known from headers before a tensor is read. Writing holds one shard at a time in memory.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import UserError
from train.run_dir import read_json

LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single file of each layout, the safer one first."""
SHARD_BYTES = 5_000_000_000
"""Largest shard that is written, as the Hub has it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Formats by their name in a safetensors header; one that is not here is reported by that name."""


@dataclass(frozen=True)
class Fact:
    """What a header says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class HubFolder:
    """The tensors of a folder by name."""

    def __init__(self, folder: str | Path, key: str) -> None:
        """Reads headers only; `key` of the config named the folder, for messages.

        Raises:
            UserError: no weights there, or files that cannot be read, or that are not those of the index.
        """
        self.folder, self._key = Path(folder), key
        self._bin: tuple[str, dict[str, Tensor]] | None = None
        self._open: dict[str, Any] = {}
        index, single = next(
            ((index, single) for index, single in LAYOUTS if (self.folder / index).exists() or (self.folder / single).exists()), ("", "")
        )
        if not single:
            names = ", ".join(name for layout in LAYOUTS for name in layout)
            raise UserError(f"{key}: no weights in {self.folder.resolve()}: none of {names} (give a folder with Hugging Face weights)")
        self.config: dict[str, Any] = self._json("config.json") or {}
        placed = self._placed(index) if (self.folder / index).exists() else None
        files = sorted(set(placed.values())) if placed is not None else [single]
        self.facts = {name: fact for file in files for name, fact in self._headers(file).items()}
        for name, file in (placed or {}).items():
            if name not in self.facts:
                raise self._unreadable(file, f"the index says that it holds {name}, it does not")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; its bytes stay in the file until they are used."""
        file = self.facts[name].file
        try:
            return self._bins(file)[name] if file.endswith(".bin") else self._opened(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file, error) from None

    def _placed(self, index: str) -> dict[str, str]:
        """File by tensor, as the index has it."""
        content = self._json(index)
        placed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(placed, dict) or not all(isinstance(f, str) and f == Path(f).name for f in placed.values()):
            raise self._unreadable(index, "no weight_map of tensor names to file names")
        return placed

    def _headers(self, file: str) -> dict[str, Fact]:
        if file.endswith(".bin"):
            return {name: Fact(file, tuple(t.shape), t.dtype) for name, t in self._bins(file).items()}
        try:
            handle = self._opened(file)
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  a handle, not a dict
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file, error) from None
        return {
            name: Fact(file, tuple(piece.get_shape()), DTYPES.get(piece.get_dtype(), piece.get_dtype())) for name, piece in slices.items()
        }

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def _bins(self, file: str) -> dict[str, Tensor]:
        """The tensors of a .bin; of those, one file at a time is kept."""
        if self._bin is None or self._bin[0] != file:
            self._bin = None
            path = self.folder / file
            try:
                content = _load_pickle(path)
            except Exception as error:  # noqa: BLE001  a damaged pickle raises whatever its reader stumbles over
                raise self._unreadable(file, error) from None
            if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
                raise self._unreadable(file, "it is not a mapping of names to tensors")
            self._bin = file, content
        return self._bin[1]

    def _json(self, name: str) -> Any | None:
        try:
            return read_json(self.folder / name)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, file: str, why: object) -> UserError:
        first = (str(why).strip() or type(why).__name__).splitlines()[0]
        return UserError(f"{self._key}: {self.folder / file} cannot be read: {first} (fetch the folder again)")


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # written by a torch before 1.6


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes one safetensors file.

    Raises:
        OSError: the file system refused; safetensors says that in an error of its own, and the number in words.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None


def write(folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes tensors as safetensors shards with their index; returns the number of shards.

    Args:
        folder: exists, and holds no weights.
        sizes: bytes of each tensor; their order is that of the files.
        read: gives a tensor by name, called once each.
        shard_bytes: a shard closes before it would be larger, unless one tensor alone is.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    placed = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save({name: read(name).contiguous() for name in names}, folder / file)
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    (folder / LAYOUTS[0][0]).write_text(json.dumps(index, indent=1))
    return len(shards)

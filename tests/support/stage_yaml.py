"""A stage's YAML over the demo's sources, as a user would write it."""

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from conftest import Demo


def write_stage(path: Path, demo: "Demo", **changes: object) -> Path:
    """One epoch of pairs, documents and text in packs of 256 tokens; `changes` replace keys of the data section."""
    data = {
        "tokenizer": str(demo.tokenizer),
        "sources": {name: {"path": str(demo.source(name))} for name in ("pairs", "documents", "text")},
        "unit": "epochs",
        "context": 256,
        "images": {"size": 64, "tokens": 4},
        "images_per_pack": 24,
        "segments_per_pack": 64,
        "global_batch": 8,
    }
    stage = {"run": {"name": "demo", "seed": 3}, "data": {**data, **changes}, "model": {"of": "another package"}}
    path.write_text(yaml.safe_dump(stage, sort_keys=False))
    return path

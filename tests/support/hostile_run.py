"""Runs hostile inputs through index, merge and materialisation in this process: `hostile_run.py FOLDER FIRST COUNT`.

One JSON line an input. Invariant: whatever goes wrong is a fault in its line, and an input that ends or hangs the process is the one
whose number was announced last.
"""

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from hostile import Case, case

from data_pipeline.batch import Segment
from data_pipeline.config import OVERHEAD, ImageConfig
from data_pipeline.errors import UserError
from data_pipeline.plan.columns import Budgets, ImagePolicy
from data_pipeline.plan.split import Pieces, split
from data_pipeline.read.materialise import Materialiser
from data_pipeline.shards.index import OK, index_shard, read_index, sidecar_path
from data_pipeline.shards.merge import merge
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.tokenizer import Tokenizer

DEADLINE = 60
"""Seconds of processor time after which an input hangs; time on the clock says nothing on a machine that others share."""
HEADROOM = 4 << 30
"""Bytes that may be mapped on top of the libraries; mapped, not used: what is bounded is the peak that each line reports."""
REASON_LENGTH = 400
BUDGETS = Budgets(tokens=4096, images=64, segments=256)
IMAGES = ImageConfig(size=32, tokens=4)
PIECES = 40
"""Pieces of a source that are read: a text of megabytes has thousands."""


class Opened:
    """Files that Python code opened to write, renamed, made or linked; seen by an audit hook, which cannot be taken off again."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(arguments[0], str | bytes | os.PathLike):
                self.paths.append(str(Path(os.fsdecode(arguments[0])).resolve()))
        elif event in ("os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.remove", "os.rmdir", "os.chmod"):
            descriptor = arguments[-1] if event in ("os.remove", "os.rmdir") else -1  # of the folder that the name is in: rmtree's way
            folder = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor >= 0 else Path()
            self.paths += [str((folder / os.fsdecode(a)).resolve()) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "os.posix_spawn"):
            self.paths.append(f"{event} {arguments!r}"[:200])


def run(made: Case, folder: Path, tokenizer: Tokenizer) -> dict:
    """What came of an input: rows kept, damage by reason, and every fault."""
    shard = folder / "a.tar"
    shard.write_bytes(made.content)
    if made.size:
        os.truncate(shard, made.size)
    index_shard(shard, folder, made.kind, tokenizer)
    table = read_index(sidecar_path(shard, folder)).table
    status = dict(zip(reversed(table["key"].to_pylist()), reversed(table["status"].to_pylist()), strict=True))
    faults = [f"{key} was lost: {status.get(key)}" for key in made.keep if status.get(key) != OK]
    reasons = [s for s in table["status"].to_pylist() if s != OK]
    try:
        merge(folder, folder)
    except UserError as error:
        if "no usable sample" not in str(error):
            raise
        return {"kept": 0, "reasons": reasons, "faults": faults}
    source = ShardSource("hostile", folder)
    if made.later is not None:
        shard.write_bytes(made.later)
    kept = source.kept(0, source.facts.kept)
    found = materialise(source, kept, tokenizer)
    for row, part in found:
        changed = made.later is not None and not same_bytes(made, source, row)
        if isinstance(part, Segment) and changed:
            faults.append(f"row {row} was read although its bytes changed")
        elif not isinstance(part, Segment):
            reasons.append(part.reason)
            expected = ("shard changed", "bytes changed") if changed else ("image does not decode",)
            if not part.reason.startswith(expected):
                faults.append(f"row {row} was kept by the index and dropped by the reader: {part.reason}")
    return {"kept": len(kept), "reasons": reasons, "faults": faults}


def materialise(source: ShardSource, rows: np.ndarray, tokenizer: Tokenizer) -> list[tuple[int, object]]:
    """(row, segment or ledger entry) of the pieces of these rows, and a batch of them all."""
    counts, elements = source.elements(rows)
    pieces = split(0, np.zeros(len(rows), np.int64), rows, counts, elements, BUDGETS, ImagePolicy(IMAGES.tokens), OVERHEAD)
    if len(pieces) > PIECES:
        pieces = pieces.take(np.linspace(0, len(pieces) - 1, PIECES).astype(int))
    reader = Materialiser([source], tokenizer, IMAGES, 0)
    parts = reader.segments(pieces)
    batch = reader.assemble([p for p in parts if isinstance(p, Segment)])
    assert int(batch.cu_seqlens[-1]) >= _tokens(pieces, parts)
    return list(zip(pieces.row.tolist(), parts, strict=True))


def _tokens(pieces: Pieces, parts: list) -> int:
    return sum(int(n) - 1 for n, p in zip(pieces.tokens, parts, strict=True) if isinstance(p, Segment))


def same_bytes(made: Case, source: ShardSource, row: int) -> bool:
    """Whether a sample lies in the changed shard as it was indexed."""
    at = source.locate(row)
    span = slice(at.offset, at.offset + at.size)
    return len(made.later) == len(made.content) and made.later[span] == made.content[span]


def expected_files(folder: Path) -> set[Path]:
    """What index and merge leave in an input's folder."""
    columns = [p for p in folder.glob("columns-*") if p.is_dir()]
    inside = {c / name for c in columns for name in ("rows.bin", "elements.bin", "kept.bin", "blocks.bin", "damaged.jsonl")}
    return {folder / n for n in ("a.tar", "a.index.parquet", "source.json")} | set(columns) | inside


def main(folder: Path, first: int, count: int) -> None:
    """Every input in a folder of its own, which is removed when it has been looked at."""
    warnings.simplefilter("ignore")
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM,) * 2)  # so that a blow-up is this process's, not the machine's
    pa.set_cpu_count(1)  # threads for tables of ten rows cost more than they do
    os.fsync = lambda _: None  # many small files; whether they outlive a power cut is not asked here
    faulthandler.register(signal.SIGXCPU, chain=True)  # says where an input hangs, then the signal ends the process
    tokenizer = Tokenizer(Path(__file__).resolve().parents[2] / "examples" / "demo" / "tokenizer")
    opened = Opened()
    for number in range(first, first + count):
        made = case(number)
        place = folder / f"input-{number}"
        place.mkdir()
        opened.paths.clear()
        print(json.dumps({"number": number, "family": made.family}), flush=True)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + DEADLINE, most))
        begin = time.process_time()
        try:
            result = run(made, place, tokenizer)
        except Exception as error:  # noqa: BLE001  the very thing that is looked for
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-4:]))
            result = {"kept": 0, "reasons": [], "faults": [f"{type(error).__name__}: {str(error)[:300]} ({where})"]}
        seconds = time.process_time() - begin
        faults = result["faults"]
        faults += [f"touched {p}" for p in opened.paths if not Path(p).is_relative_to(place)]
        faults += [f"left {p}" for p in set(place.rglob("*")) - expected_files(place)]
        faults += [f"reason without sense: {r[:100]!r}" for r in result["reasons"] if len(r) > REASON_LENGTH or not r or r.endswith(": ")]
        shutil.rmtree(place)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"number": number, **result, "seconds": seconds, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))

"""The loader against its decode limit and against its peers on the same tars: `python benchmarks/loader.py [--rounds 5] [--quick]`.

Invariant: every figure is a ratio of two contestants of one round, and every contestant is a fresh process with one worker. The rounds
are interleaved; medians and spread are printed, and the last line is JSON. `make bench-peers` makes the environment of the peers;
without it they are not measured and their figures are null.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fixture

from train.device import cpu_name

ROOT = Path(__file__).resolve().parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS = {"webdataset": "webdataset", "energon": "megatron-energon", "litdata": "litdata", "mosaic": "mosaicml-streaming"}
"""Packages of the peers, by the name that `benchmarks/peers/with_NAME.py` gives them."""
DECODERS = ("pil", "fast")
RESUMES = ((0, 1), (1, 0), (1000, 17), (60_000, 29))
"""Cursors at which a run is resumed; each is a step of any run this long."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    pictures: int
    skip: int
    count: int
    memory_batches: int
    resumes: tuple[tuple[int, int], ...] = RESUMES


Samples = dict[str, list[float]]
"""A value a round, by figure."""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measures the loader against its decode limit and its peers; ends with a line of JSON.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--quick", action="store_true", help="one round of a few pictures: shows that it runs, measures nothing")
    args = parser.parse_args()
    size = Size(1, 100, 4, 12, 40, RESUMES[-1:]) if args.quick else Size(args.rounds, 2000, 64, 512, 1000)
    peers = list(PEERS) if PEERS_PYTHON.exists() else []
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        shards, work = Path(folder) / "shards", Path(folder) / "work"
        fixture.make(shards, size.pictures)
        fixture.index(shards)
        work.mkdir()
        ready = {peer: _peer(peer, "prepare", shards, work)["processor_s"] for peer in peers}
        rounds: Samples = {}
        for number in range(size.rounds):
            for name, value in _round(number, shards, work, peers, size).items():
                rounds.setdefault(name, []).append(value)
            print(f"round {number + 1} of {size.rounds} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        growth = _ours("memory", shards, size.memory_batches)["growth_mib"]
    _report(rounds, ready, growth)


def _round(number: int, shards: Path, work: Path, peers: list[str], size: Size) -> dict[str, float]:
    """Every contestant once, beginning with another one each round."""
    contestants = {
        "decode limit": lambda: _ours("limit", shards, size.skip, size.count),
        "ours": lambda: _ours("loader", shards, size.skip, size.count),
    }
    for peer in peers:
        for decoder in DECODERS:
            contestants[f"{peer}, {decoder}"] = lambda p=peer, d=decoder: _peer(p, "run", shards, work, d, size.skip, size.count)
    names = list(contestants)
    turn = number % len(names)
    found: dict[str, float] = {}
    for name in names[turn:] + names[:turn]:
        result = contestants[name]()
        found.update({f"{name}: pictures a second of {what}": rate for what, rate in result.items()})
    rate = {name: found[f"{name}: pictures a second of the worker"] for name in names}
    found["of_decode_limit"] = rate["ours"] / rate["decode limit"]
    for peer in peers:
        found[f"vs_{peer}"] = rate["ours"] / rate[f"{peer}, pil"]
        found[f"vs_{peer}_our_decoder"] = rate["ours"] / rate[f"{peer}, fast"]
    cold = _ours("start", shards, 0, 0)["seconds"]
    found["first_batch_s"] = cold
    found["resume_extra_s"] = max(_ours("start", shards, *cursor)["seconds"] for cursor in size.resumes) - cold
    return found


def _report(rounds: Samples, ready: dict[str, float], growth: float) -> None:
    print(f"\n{'':56} {'median':>9} {'least':>9} {'most':>9}")
    for name, values in rounds.items():
        print(f"{name:56} {statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}")
    print(f"{'worker_growth_mib':56} {growth:9.3f}")
    for peer, seconds in ready.items():
        print(f"{f'{peer}: processor seconds to make the tars ready':56} {seconds:9.3f}")
    if not ready:
        print("peers were not measured: no .venv-peers (run: make bench-peers)")
    asked = ["of_decode_limit", *(f"vs_{peer}{what}" for peer in PEERS for what in ("", "_our_decoder")), "first_batch_s", "resume_extra_s"]
    figures: dict[str, Any] = {name: round(statistics.median(rounds[name]), 3) if name in rounds else None for name in asked}
    figures["worker_growth_mib"] = round(growth, 3)
    figures["spread"] = {name: [round(min(rounds[name]), 3), round(max(rounds[name]), 3)] for name in asked if name in rounds}
    print(json.dumps({"name": "loader", "figures": figures, "versions": _versions(list(ready))}))


def _versions(peers: list[str]) -> dict[str, Any]:
    ours = {name: version(name) for name in ("torch", "numpy", "pillow", "simplejpeg")}
    theirs = {
        peer: _output([PEERS_PYTHON, "-c", f"from importlib.metadata import version; print(version({PEERS[peer]!r}))"]) for peer in peers
    }
    machine = {"processor": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return {
        "commit": _output(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]),
        "python": platform.python_version(),
        **ours,
        **theirs,
        **machine,
    }


def _ours(what: str, *arguments: object) -> dict[str, float]:
    return _run([sys.executable, ROOT / "benchmarks" / "ours.py", what, *arguments])


def _peer(peer: str, *arguments: object) -> dict[str, float]:
    return _run([PEERS_PYTHON, ROOT / "benchmarks" / "peers" / f"with_{peer}.py", *arguments])


def _run(command: list[Any]) -> dict[str, float]:
    return json.loads(_output(command).splitlines()[-1])


def _output(command: list[Any]) -> str:
    """What a command prints; it is given our code to import, and one thread.

    Raises:
        SystemExit: it failed; its own words are shown.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(str(c) for c in command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()

"""The small model's figures over several seeds: trains and measures what is missing, and prints the table of docs/results.md.

Invariant: a seed changes weights, data order and dropout; data, splits and settings stay. Every figure is read from a file of a run
directory; `--check` fails where the document says something else.

    make small-data
    python examples/small/results.py 0 1 2                          (an hour a seed on two cores)
    python examples/small/results.py 0 1 2 --check docs/results.md
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from train.run_dir import RunDir

RUNS = Path("runs/small/seeds")
BIN = Path(sys.executable).parent
STAGES = ("blind", "pretrain")
SUITES = ("captions", "text")
FIGURES = ("retrieval_of_10", "picture_of_10", "nll_right", "nll_wrong", "greedy_exact")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Figures of the small model over several seeds, as the table of docs/results.md.")
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--procs", default="2", help="ranks of a training (default 2)")
    parser.add_argument("--check", type=Path, help="a document that must hold the table; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None:
        for seed in arguments.seeds:
            train(seed, arguments.procs)
    table = "\n".join(lines(arguments.seeds))
    print(f"\n{table}")
    if arguments.check and table not in arguments.check.read_text():
        print(f"error: {arguments.check} does not hold this table (put it there)", file=sys.stderr)
        return 1
    return 0


def train(seed: int, procs: str) -> None:
    """Trains and measures what is not there yet; what was interrupted goes on."""
    for stage in STAGES:
        run = RunDir(RUNS / str(seed) / stage)
        if not run.final.exists():
            overrides = [f"run.seed={seed}", f"run.dir={run.path}", "track.wandb=false"]
            subprocess.run([BIN / "xc-train", "run", f"configs/small/{stage}.yaml", "--procs", procs, *overrides], check=True)
        for suite in SUITES if stage == "pretrain" else SUITES[:1]:
            out = run.path / f"{suite}.json"
            if not out.exists():
                subprocess.run([BIN / "xc-compose", "eval", run.path, "--suite", suite, "-o", out], check=True)


def lines(seeds: list[int]) -> list[str]:
    """The table: held-out test pairs of concepts that no stage has seen, a column a seed."""
    found = [figures(RUNS / str(seed)) for seed in seeds]
    rows = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", "|---" * (len(seeds) + 2) + "|"]
    for name in found[0]:
        values = [f[name] for f in found]
        if isinstance(values[0], str):
            rows.append(f"| {name} | {' | '.join(values)} | |")
            continue
        cells = [f"{value:.3f}{f' ± {error:.3f}' if error else ''}" for value, error in values]
        rows.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(value for value, _ in values):.3f} |")
    return rows


def figures(folder: Path) -> dict[str, str | tuple[float, float | None]]:
    """Of one seed: each figure with its standard error, or words."""
    test, blind = (_table(folder / stage / "captions.json", "test") for stage in ("pretrain", "blind"))
    text = json.loads((folder / "pretrain" / "text.json").read_text())["tables"][0]
    found: dict[str, str | tuple[float, float | None]] = {name: test[name] for name in FIGURES}
    found["nll of the control that sees no picture"] = blind["nll_blind"]
    found["text alone, against the base model"] = text["notes"][0].removeprefix("Logits ").rstrip(".")
    found["minutes of training"] = RunDir(folder / "pretrain").lived_s() / 60, None
    return found


def _table(file: Path, split: str) -> dict[str, tuple[float, float | None]]:
    tables = {table["name"]: table for table in json.loads(file.read_text())["tables"]}
    return {row["figure"]: (row["value"], row["stderr"]) for row in tables[split]["rows"]}


if __name__ == "__main__":
    sys.exit(main())

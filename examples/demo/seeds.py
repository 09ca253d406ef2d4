"""The demo's figures over several seeds: trains the three stages once a seed and prints the means as a Markdown table.

Invariant: a seed changes weights, data order and augmentation; data, splits and settings stay. Finished seeds are not run again.

    python examples/demo/seeds.py 0 1 2      (about six minutes a seed on two cores; after make demo, which indexes the data)
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

STAGES = ("language", "pretrain", "sft")
RUNS = Path("runs/seeds")
PROGRAM = str(Path(sys.executable).parent / "xc-train")


def main(seeds: list[str]) -> None:
    """Runs what is missing and prints the table."""
    summaries = [train(seed) for seed in seeds]
    print(f"\n| test half | figure | {' | '.join(f'seed {s}' for s in seeds)} | mean | deviation |")
    print("|---" * (len(seeds) + 4) + "|")
    for stage in ("pretrain", "sft"):
        for split in ("unseen_picture", "unseen_concept"):
            for figure in ("retrieval_of_10", "nll_right", "nll_wrong", "nll_language_model"):
                row(f"{stage}, {split}", figure, [s["stages"][stage][split][figure] for s in summaries])


def train(seed: str) -> dict:
    """Summary of one seed."""
    folder = RUNS / seed
    for number, stage in enumerate(STAGES):
        overrides = [f"run.seed={seed}", f"run.dir={folder / stage}", "track.wandb=false", "track.every=50"]
        overrides += [f"run.init_from={folder / STAGES[number - 1]}"] if number else []
        subprocess.run([PROGRAM, "run", f"configs/demo/{number + 1}_{stage}.yaml", "--procs", "2", *overrides], check=True)
    subprocess.run([PROGRAM, "report", str(folder)], check=True)
    return json.loads((folder / "summary.json").read_text())


def row(where: str, figure: str, values: list[float]) -> None:
    """One line of the table."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"| {where} | {figure} | {' | '.join(f'{v:.3f}' for v in values)} | **{statistics.mean(values):.3f}** | {deviation:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])

"""What Partial LoRA buys: projector only, PLoRA, LoRA on all tokens and full fine-tuning, on the same pictures, as docs/plora_ablation.md.

Invariant: all arms see the same pairs in the same order for a seed; an arm's learning rate is the one whose short run, of seed 0, has the
lowest caption loss on the validation half; figures are of the test half, which decides nothing. Finished runs are not repeated.

    python examples/small/ablation.py 0 1 2                                 (about three hours on two cores; goes on where it was stopped)
    python examples/small/ablation.py 0 1 2 --check docs/plora_ablation.md
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from results import BIN, HELD_OUT, exit_with, marked, printed
from results import RUNS as SEEDS

from train import configure
from train.evaluate import Scorer
from train.launch import run_stage
from train.run_dir import RunDir, write_atomic, write_json
from train.weights.opened import open_model

RUNS = Path("runs/small/ablation")
RATES = {
    "projector": ("1e-3", "3e-3", "1e-2"),
    "plora": ("5e-4", "1e-3", "2e-3"),
    "lora": ("2e-4", "5e-4", "1e-3"),
    "full": ("5e-5", "1e-4", "3e-4"),
}
"""Learning rates that are tried, by arm."""
TUNING_EPOCHS = "0.5"
SUITES = {"captions": ("--data", HELD_OUT / "test"), "text": ()}
COLUMNS = {
    ("captions", "nll_right"): "nats a token of a caption",
    ("captions", "wrong_minus_right"): "more behind a wrong picture",
    ("captions", "retrieval_of_10"): "caption among ten",
    ("captions", "picture_of_10"): "picture among ten",
    ("text", "minus_base"): "change of nats on text alone",
}
"""Suite of `xc-compose eval` and its figure; what the table calls it."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Projector only, PLoRA, LoRA and full fine-tuning on the same data, as two tables.")
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--procs", type=int, default=2, help="ranks of a training (default 2)")
    parser.add_argument("--check", type=Path, help="a document that must hold the tables; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None:
        for seed in arguments.seeds:
            for arm in RATES:
                measure(arm, seed, arguments.procs)
    return printed((tuning_table(), outcome_table(arguments.seeds)), arguments.check)


def tune(arm: str, rate: str, procs: int) -> None:
    """Trains a short run of seed 0 and measures the validation captions behind their pictures."""
    found = tuning_file(arm, rate)
    if not found.exists():
        run = RunDir(found.parent)
        train(run, arm, rate, 0, procs, f"data.sources.pairs.weight={TUNING_EPOCHS}")
        opened = open_model(run.path)
        scorer = Scorer(opened.model, opened.tokenizer, opened.config)
        right = scorer.captions("validation", HELD_OUT / "validation", sys.maxsize)["right"]
        write_json(found, {"nll_right": scorer.score(right).mean()})


def tuning_file(arm: str, rate: str) -> Path:
    """What a short run found."""
    return RUNS / "tuning" / f"{arm}-{rate}" / "validation.json"


def tuned(arm: str, rate: str) -> float:
    """Nats a token."""
    return float(json.loads(tuning_file(arm, rate).read_text())["nll_right"])


def best_rate(arm: str) -> str:
    """The arm's learning rate."""
    return min(RATES[arm], key=lambda rate: tuned(arm, rate))


def measure(arm: str, seed: int, procs: int) -> RunDir:
    """Trains with the arm's learning rate, and measures the test half."""
    for rate in RATES[arm]:
        tune(arm, rate, procs)
    run = RunDir(RUNS / str(seed) / arm)
    train(run, arm, best_rate(arm), seed, procs)
    for suite, data in SUITES.items():
        out = run.path / f"{suite}.json"
        if not out.exists():
            subprocess.run([BIN / "xc-compose", "eval", run.path, "--suite", suite, *data, "-o", out], check=True)
    return run


def train(run: RunDir, arm: str, rate: str, seed: int, procs: int, *overrides: str) -> None:
    """Trains what has not ended yet; what was interrupted goes on.

    Raises:
        SystemExit: the run did not end.
    """
    if (run.final / "manifest.json").exists():
        return
    always = [f"run.dir={run.path}", f"run.seed={seed}", f"train.lr={rate}", "track.wandb=false"]
    config = configure.load(Path(f"configs/small/ablation/{arm}.yaml"), [*always, *overrides])
    run.create()
    write_atomic(run.config, configure.to_yaml(config).encode())
    code = run_stage(config, procs)
    if code:
        raise SystemExit(code)


def tuning_table() -> str:
    """A row an arm; the chosen rate is bold."""
    lines = ["| | learning rate: nats a token on the validation half |", "|---|---|"]
    for arm, rates in RATES.items():
        chosen = best_rate(arm)
        lines.append(f"| {arm} | {' · '.join(marked(f'{rate}: {tuned(arm, rate):.3f}', rate == chosen) for rate in rates)} |")
    return "\n".join(lines)


def outcome_table(seeds: list[int]) -> str:
    """A row an arm: mean over seeds, and their standard deviation."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | minutes |", "|---" * (len(COLUMNS) + 2) + "|"]
    blind = [RunDir(SEEDS / str(seed) / "blind").evaluation for seed in seeds]
    losses = [json.loads(file.read_text())["splits"]["test"]["nll_blind"] for file in blind]
    lines.append(f"| language model that learnt the captions without pictures | {_spread(losses)} |" + " |" * len(COLUMNS))
    for arm in RATES:
        runs = [RunDir(RUNS / str(seed) / arm) for seed in seeds]
        cells = [_spread([_figure(run, *column) for run in runs]) for column in COLUMNS]
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.mean(run.lived_s() for run in runs) / 60:.1f} |")
    return "\n".join(lines)


def _figure(run: RunDir, suite: str, figure: str) -> float:
    rows = json.loads((run.path / f"{suite}.json").read_text())["tables"][0]["rows"]
    return next(row["value"] for row in rows if row["figure"] == figure)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    exit_with(main)

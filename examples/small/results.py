"""The small model's figures over several seeds: trains and measures what is missing, and prints the tables of docs/results.md.

Invariant: a seed changes weights, data order, augmentation and dropout; data, splits and settings stay. Every figure is read from files
of run directories into the seed's record, docs/results/seed-N.json; that of the language model which sees no picture is its control's
(control.py). A seed that has a record is not trained again: delete it and the run directories to measure anew. `--check` fails where the
document says something else than the records, or a record than run directories that are there.

    make small-data
    python examples/small/control.py 0 1 2
    python examples/small/results.py 0 1 2                          (45 minutes a seed on two quiet cores with bf16)
    python examples/small/results.py 0 1 2 --check docs/results.md
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import control
from captions import category_of
from records import BIN, HELD_OUT, RESULTS, end_where_it_fails, exit_with, keep, kept, printed, require_same, run_stage, sample_table, shown

from train import configure
from train.run_dir import RunDir, write_json

RUNS = Path("runs/small/seeds")
ALIKE = HELD_OUT / "alike"
FIGURES = {
    "retrieval_of_10": "caption of its picture, among ten",
    "picture_of_10": "picture of its caption, among ten",
    "greedy_exact": "greedy captions that are exactly right",
    "nll_right": "nats a token of a caption, behind its picture",
    "nll_wrong": "behind a wrong picture",
}
"""In `evaluation.json`; what the table calls them."""
LESS = "less than that, caption by caption"
CONTROL = "of the language model that learnt the same captions without pictures"
B_NORM = "norm of B, which is 0 at the start"
MINUTES = "minutes of training"
CONTROL_MINUTES = "minutes of the language model's"


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Figures of the small model over several seeds, as the tables of docs/results.md.")
    parser.add_argument(
        "seeds",
        nargs="+",
        type=int,
        help="seeds of the table's columns: 0 1 2; three quarters of an hour each with bf16, twice that without, unless they have a record",
    )
    parser.add_argument("--procs", default="2", help="ranks of a training (default 2)")
    parser.add_argument("--check", type=Path, help="a document that must hold the tables; nothing is trained")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        if arguments.check is None and not record_of(seed).exists():
            train(seed, arguments.procs)
            keep(record_of(seed), measured(seed))
        if all(file.exists() for file in files_of(seed)):
            require_same(record_of(seed), measured(seed), RUNS / str(seed))
        known = recorded(seed)["figures"]
        cure = f"delete {record_of(seed)} and {files_of(seed)[-1]}, and run results.py {seed}"
        control.require_difference(known[LESS][0], known[FIGURES["nll_right"]][0], seed, cure)
    return printed((figures(arguments.seeds), sample_table(recorded(arguments.seeds[0])["samples"])), arguments.check)


def record_of(seed: int) -> Path:
    """The file that keeps what was measured."""
    return RESULTS / f"seed-{seed}.json"


def recorded(seed: int) -> dict[str, Any]:
    """What it holds: `processor`, `figures` (words, or a figure with its standard error) by name, `samples`."""
    return kept(record_of(seed))


def train(seed: int, procs: str) -> None:
    """Trains and measures what is not there yet; what was interrupted goes on.

    Raises:
        UserError: the control's weights, which captions are compared with in the end, went with another machine.
    """
    control.require_weights(seed)
    config = configure.load(Path("configs/small/pretrain.yaml"), [f"run.seed={seed}", f"run.dir={run_of(seed).path}"])
    run_stage(config, {"test": str(HELD_OUT / "test")}, procs)
    _, text, alike, paired = files_of(seed)
    for file, suite, data in ((text, "text", HELD_OUT / "text"), (alike, "captions", ALIKE)):
        if not file.exists():
            end_where_it_fails(BIN / "xc-compose", "eval", file.parent, "--suite", suite, "--data", data, "-o", file)
    if not paired.exists():
        write_json(paired, control.less_of(run_of(seed), seed))


def run_of(seed: int) -> RunDir:
    """Where it is trained."""
    return RunDir(RUNS / str(seed) / "pretrain")


def files_of(seed: int) -> list[Path]:
    """What a seed's figures are read from."""
    run = run_of(seed)
    return [run.evaluation, run.path / "text.json", run.path / "alike.json", run.path / "paired.json"]


def figures(seeds: list[int]) -> str:
    """A column a seed; of the test pairs, whose concepts no stage has seen. The mean is followed by the seeds' standard deviation."""
    records = [recorded(seed) for seed in seeds]
    columns = [_column(record["figures"], control.recorded(seed)) for seed, record in zip(seeds, records, strict=True)]
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | bar |", "|---" * (len(seeds) + 3) + "|"]
    of_row = {name: [column[name] for column in columns] for name in columns[0]}
    values = {name: [cell[0] for cell in row] for name, row in of_row.items() if not isinstance(row[0], str)}
    means = {name: statistics.mean(found) for name, found in values.items()}
    for name, row in of_row.items():
        if name not in means:
            lines.append(f"| {name} | {' | '.join(row)} | | |")
            continue
        cells = [f"{cell[0]:.3f}{f' ± {cell[1]:.3f}' if cell[1] else ''}" for cell in row]
        spread = f" ± {statistics.stdev(values[name]):.3f}" if len(values[name]) > 1 else ""
        lines.append(f"| {name} | {' | '.join(cells)} | **{means[name]:.3f}**{spread} | {bar(name, means)} |")
    lines.append(f"| trained on | {' | '.join(record['processor'] for record in records)} | | |")
    return "\n".join(lines)


def _column(figures: dict[str, Any], of_control: dict[str, Any]) -> dict[str, Any]:
    """A seed's figures, with those of its control."""
    rows = list(figures.items())
    behind = list(figures).index(FIGURES["nll_wrong"]) + 1
    rows.insert(behind, (CONTROL, of_control["test"]))
    return dict(rows) | {CONTROL_MINUTES: [of_control["minutes"], None]}


def bar(name: str, means: dict[str, float]) -> str:
    """What the mean of a row is asked to reach, and whether it does."""
    at_least = {FIGURES["retrieval_of_10"]: 0.5, FIGURES["picture_of_10"]: 0.6}
    at_most = {FIGURES["nll_right"]: means[CONTROL], MINUTES: 60.0}
    if name in at_least:
        return f"at least {at_least[name]:g}: {'held' if means[name] >= at_least[name] else 'missed'}"
    if name in at_most:
        return f"at most {at_most[name]:.3f}: {'held' if means[name] <= at_most[name] else 'missed'}"
    return ""


def measured(seed: int) -> dict[str, Any]:
    """What the files of a seed's run directories say: each figure with its standard error over concepts, or words; samples."""
    of_pretrain, of_text, of_alike, less = (json.loads(file.read_text()) for file in files_of(seed))
    seeing = of_pretrain["splits"]["test"]
    text, alike = of_text["tables"][0], of_alike["tables"][0]
    among_alike = {row["figure"]: [row["value"], row["stderr"]] for row in alike["rows"]}
    found: dict[str, str | list[float | None]] = {words: [seeing[f], seeing["stderr"][f]] for f, words in FIGURES.items()}
    found[LESS] = less
    found["caption among ten, by guessing among those of the right category"] = [category_alone(HELD_OUT / "test"), None]
    found["caption among ten that are alike"] = among_alike["retrieval_of_10"]
    found["picture among ten that are alike"] = among_alike["picture_of_10"]
    found["caption among ten alike, by guessing among those of the right category"] = [category_alone(ALIKE), None]
    found["number format"] = of_pretrain["dtype"].removeprefix("torch.")
    found["text alone: logits"] = text["notes"][0].removeprefix("Logits ").rstrip(".")
    found[B_NORM] = [of_pretrain["plora_b_norm"], None]
    found[MINUTES] = [run_of(seed).lived_s() / 60, None]
    return {"figures": found, "samples": shown(seeing["samples"])}


def category_alone(split: Path) -> float:
    """How often a caption is found by someone who sees its category and nothing else."""
    items = json.loads((split / "candidates.json").read_text())["items"]
    of = [[category_of(caption) for caption in (item["caption"], *item["candidates"])] for item in items]
    return statistics.mean(1 / candidates.count(right) for right, *candidates in of)


if __name__ == "__main__":
    exit_with(main)

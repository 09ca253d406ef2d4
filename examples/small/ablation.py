"""What Partial LoRA buys: projector only, PLoRA, LoRA on all tokens and full fine-tuning, on the same pictures, as docs/plora_ablation.md.

Invariant: all arms see the same pairs in the same order for a seed, as often. An arm's learning rate is the one whose run of seed 0 has the
lowest caption loss on the validation half; beside another part, the projector keeps the rate that it prefers alone. Figures are of the
test half, which decides nothing. Above them stands the language model that sees no picture (control.py). What a run reached is kept in
its record, docs/plora_ablation/SEED/ARM-RATE.json; what a record holds, of the same learning rates, is not trained or measured again:
delete it and the run directory for that.

    python examples/small/control.py 0 1 2
    python examples/small/ablation.py 0 1 2                                 (23 trainings, two at once, five to six hours; it goes on)
    python examples/small/ablation.py 0 1 2 --check docs/plora_ablation.md
"""

import argparse
import errno
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import control
import torch
from records import BIN, HELD_OUT, end_where_it_fails, exit_with, keep, kept, marked, printed, require_same, run_stage

from train import configure
from train.config import Config
from train.evaluate import Scorer, Scores
from train.run_dir import RunDir
from train.weights.opened import Opened, first_weights, open_model

RECORDS = Path("docs/plora_ablation")
RUNS = Path("runs/small/ablation")
CONFIGS = Path("configs/small/ablation")
RATES = {
    "projector": ("1e-3", "3e-3", "1e-2", "3e-2"),
    "plora": ("3e-4", "1e-3", "3e-3", "1e-2"),
    "lora": ("1e-4", "3e-4", "1e-3", "3e-3"),
    "full": ("3e-5", "1e-4", "3e-4"),
}
"""Learning rates that are tried, by arm: of the projector where it learns alone, else of what learns beside it (the second group)."""
ALONE = ("projector",)
COLUMNS = {
    "nll_right": "nats a token of a caption",
    "less": "less than with no picture, caption by caption",
    "wrong_minus_right": "more behind a wrong picture",
    "picture_of_10": "picture among ten",
    "retrieval_of_10": "caption among ten",
    "words": "change of nats on words alone",
}
"""Figure of a record; what the table calls it."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Projector only, PLoRA, LoRA and full fine-tuning on the same data, as two tables.")
    seeds = "seeds whose mean the table shows: 0 1 2; rates are tuned with seed 0; 23 trainings, hours, but for what has a record"
    parser.add_argument("seeds", nargs="+", type=int, help=seeds)
    at_once = (
        "trainings side by side, of one rank each (default 2); they share the cores, and one of all weights takes up to 16 GB: then give 1"
    )
    parser.add_argument("--at-once", type=int, choices=range(1, 9), default=2, metavar="N", help=at_once)
    parser.add_argument("--check", type=Path, help="a document that must hold the tables; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None:
        for seed in arguments.seeds:
            if not is_measured(seed):
                control.require_weights(seed)
        threads = max(1, (os.cpu_count() or 1) // arguments.at_once)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        beside = [arm for arm in RATES if arm not in ALONE]
        for arms in (ALONE, beside):  # these stand beside a projector of the rate that it prefers alone
            side_by_side(tune, [(arm, rate) for arm in arms for rate in RATES[arm]], arguments.at_once)
        side_by_side(measure, [(arm, seed) for seed in arguments.seeds for arm in RATES], arguments.at_once)
    for arm, seed in product(RATES, arguments.seeds):
        check_record(arm, seed)
    return printed((tuning_table(), outcome_table(arguments.seeds)), arguments.check)


def side_by_side(work: Callable[[str, Any], None], tasks: Sequence[tuple[str, Any]], at_once: int) -> None:
    """Works on so many tasks at once. Where one fails, those that run come to their end, and no other is begun."""
    waiting = list(tasks)
    taken = iter(waiting)

    def go_on() -> None:
        try:
            for task in taken:
                work(*task)
        finally:
            waiting.clear()

    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(go_on) for _ in range(at_once)]:
            worker.result()


def run_of(arm: str, rate: str, seed: int) -> RunDir:
    """Where such a run lies."""
    return RunDir(RUNS / str(seed) / f"{arm}-{rate}")


def config_of(arm: str, rate: str, seed: int) -> Config:
    """The arm's config at a rate."""
    config = configure.load(CONFIGS / f"{arm}.yaml", [f"run.dir={run_of(arm, rate, seed).path}", f"run.seed={seed}"])
    config.train.lr, *beside = rates_of(arm, rate)
    for own in beside:
        config.train.groups[1].lr_scale = own / config.train.lr
    return config


def train(arm: str, rate: str, seed: int) -> RunDir:
    """Trains what has not ended yet."""
    print(f"\n{arm} at {rate}, seed {seed} ({len(list(RECORDS.glob('*/*.json')))} runs are on record)", flush=True)
    run_stage(config_of(arm, rate, seed), {}, "1")
    return run_of(arm, rate, seed)


def record_of(arm: str, rate: str, seed: int) -> Path:
    """The file that keeps what a run reached: nats a token on the `validation` half; of the `test` half [figure, its error]; `minutes`.

    And the `format` of its numbers, for who compares machines.
    """
    return RECORDS / str(seed) / f"{arm}-{rate}.json"


def recorded(arm: str, rate: str, seed: int) -> dict[str, Any]:
    """What it holds; nothing if it is not there, or of other rates: the projector's may have been chosen anew since."""
    file = record_of(arm, rate, seed)
    found = kept(file) if file.exists() else {}
    return found if found.get("rates") == rates_of(arm, rate) else {}


def rates_of(arm: str, rate: str) -> list[float]:
    """The learning rates of what learns."""
    return [float(rate)] if arm in ALONE else [float(best_rate("projector")), float(rate)]


def add(arm: str, rate: str, seed: int, run: RunDir, found: dict[str, Any]) -> None:
    """Adds to a record what was found of a run."""
    known = recorded(arm, rate, seed)
    always = {"rates": rates_of(arm, rate), "minutes": run.lived_s() / 60}
    keep(record_of(arm, rate, seed), known | always | found)


def tune(arm: str, rate: str) -> None:
    """Trains with seed 0 and measures the validation captions behind their pictures."""
    if "validation" not in recorded(arm, rate, 0):
        run = train(arm, rate, 0)
        opened = open_model(run.path)
        captions = Scorer(opened.model, opened.tokenizer, opened.config)
        segments = captions.captions("validation", HELD_OUT / "validation", sys.maxsize)["right"]
        add(arm, rate, 0, run, {"validation": captions.score(segments).mean()})


def tuned(arm: str, rate: str) -> float:
    """What the run of seed 0 reached on the validation half: nats a token."""
    return float(asked_of(arm, rate, 0, "validation"))


def asked_of(arm: str, rate: str, seed: int, key: str) -> Any:
    """A part of a record.

    Raises:
        FileNotFoundError: it was not measured, or with other rates.
    """
    found = recorded(arm, rate, seed)
    if key not in found:
        raise FileNotFoundError(errno.ENOENT, f"no {key}", f"{key} of rates {rates_of(arm, rate)} in {record_of(arm, rate, seed)}")
    return found[key]


def best_rate(arm: str) -> str:
    """The arm's learning rate."""
    return min(RATES[arm], key=lambda rate: tuned(arm, rate))


def tested(arm: str, seed: int) -> dict[str, list[float]]:
    """What it reached with that on the test half.

    Raises:
        FileNotFoundError: not all of it was measured.
    """
    rate = best_rate(arm)
    found = asked_of(arm, rate, seed, "test")
    for figure in COLUMNS.keys() - found.keys():
        raise FileNotFoundError(errno.ENOENT, f"no {figure}", f"{figure} in {record_of(arm, rate, seed)}")
    return found


def is_measured(seed: int) -> bool:
    """Whether all arms have all figures."""
    try:
        return all(tested(arm, seed) for arm in RATES)
    except FileNotFoundError:
        return False


def measure(arm: str, seed: int) -> None:
    """Trains with the arm's learning rate, and measures the test half."""
    rate = best_rate(arm)
    known = recorded(arm, rate, seed).get("test", {})
    if COLUMNS.keys() <= known.keys():
        return
    run = train(arm, rate, seed)
    out = captions_of(run)
    if not out.exists():
        end_where_it_fails(BIN / "xc-compose", "eval", run.path, "--suite", "captions", "--data", HELD_OUT / "test", "-o", out)
    found = told_by(out)
    opened = open_model(run.path)
    found["less"] = known.get("less") or control.less_of(run, seed)
    found["words"] = known.get("words") or change_of_words(opened)
    add(arm, rate, seed, run, {"test": found, "format": str(opened.dtype).removeprefix("torch.")})


def captions_of(run: RunDir) -> Path:
    """Where its captions' tables lie."""
    return run.path / "captions.json"


def told_by(captions: Path) -> dict[str, list[float]]:
    """Figures of such a file, with their standard errors."""
    return {row["figure"]: [row["value"], row["stderr"]] for row in json.loads(captions.read_text())["tables"][0]["rows"]}


def check_record(arm: str, seed: int) -> None:
    """A record says what the run directory says, if that is there, and compares with the control that is chosen now.

    Raises:
        UserError: it does not.
    """
    rate = best_rate(arm)
    record, run, test = record_of(arm, rate, seed), run_of(arm, rate, seed), tested(arm, seed)
    control.require_difference(test["less"][0], test["nll_right"][0], seed, f"delete {record}, and run ablation.py {seed}")
    if captions_of(run).exists():
        require_same(record, {"test": test | told_by(captions_of(run)), "minutes": run.lived_s() / 60}, run.path)


def change_of_words(opened: Opened) -> list[float]:
    """Nats a token more than the language model that all arms begin from pays for held-out words, and their standard error."""
    ours, base = words_alone(opened), base_words()
    change = Scores(ours.nll - base.nll, base.tokens)
    return [change.mean(), change.stderr()]


def words_alone(opened: Opened) -> Scores:
    """Of the held-out paragraphs, without the first token and the end: those tell that something begins and ends, which captions teach."""
    scorer = Scorer(opened.model, opened.tokenizer, opened.config)
    segments = scorer.texts(HELD_OUT / "text")
    for segment in segments:
        segment.rendered.supervised[[1, -1]] = False
    return scorer.score(segments)


@cache
def base_words() -> Scores:
    """The same of the language model that all arms begin from."""
    return words_alone(first_weights(config_of("projector", best_rate("projector"), 0)))


def tuning_table() -> str:
    """A row an arm; the chosen rate is bold. One at an end of what was tried may not be the best that there is."""
    lines = ["| | learning rate: nats a token on the validation half | |", "|---|---|---|"]
    for arm, rates in RATES.items():
        chosen = best_rate(arm)
        tried = " · ".join(marked(f"{rate}: {tuned(arm, rate):.3f}", rate == chosen) for rate in rates)
        lines.append(f"| {arm} | {tried} | {'at an end' if chosen in (rates[0], rates[-1]) else ''} |")
    return "\n".join(lines)


def outcome_table(seeds: list[int]) -> str:
    """A row an arm: mean over seeds, their standard deviation, and in brackets the standard error over what was asked, of a seed."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | minutes |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines.append(f"| no picture | {_spread([control.recorded(seed)['test'] for seed in seeds])} |{' |' * len(COLUMNS)}")
    for arm in RATES:
        tests = [tested(arm, seed) for seed in seeds]
        cells = [_spread([test[figure] for test in tests]) for figure in COLUMNS]
        minutes = statistics.mean(asked_of(arm, best_rate(arm), seed, "minutes") for seed in seeds)
        lines.append(f"| {arm} | {' | '.join(cells)} | {minutes:.0f} |")
    return "\n".join(lines)


def _spread(figures: Sequence[Sequence[float]]) -> str:
    """Of figures of seeds, each with its standard error."""
    values, errors = zip(*figures, strict=True)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({statistics.mean(errors):.3f})"


if __name__ == "__main__":
    exit_with(main)

"""The control of the small model: the language model learns the captions without their pictures, as well as validation can tell.

Invariant: learning rate and passes over the captions are those whose run of seed 0 has the lowest loss on the captions of the validation
half; of a rate, twice as many passes are tried until they are worse. Figures are of the test half, which decides nothing.
`configs/small/blind.yaml` holds that choice. What a run reached is kept in its record, docs/results/control/SEED/RATE-PASSES.json: where
there is one, nothing is trained; delete it and the run directory for that.

    python examples/small/control.py 0 1 2                          (7 trainings, an hour and a half on two cores with bf16)
    python examples/small/control.py 0 1 2 --check docs/results.md
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from records import HELD_OUT, RESULTS, exit_with, keep, kept, marked, printed, require_same, run_stage

from data_pipeline.errors import UserError
from train import configure
from train.config import Config
from train.evaluate import Scorer, Scores
from train.run_dir import RunDir
from train.weights.opened import open_model

RECORDS = RESULTS / "control"
RUNS = Path("runs/small/control")
CONFIG = Path("configs/small/blind.yaml")
RATES = ("1e-4", "3e-4")
DOUBLED = (1, 2, 4, 8)
"""Passes over the captions, in the order in which they are tried."""
HALVES = ("validation", "test")
ROUNDED = 1e-4
"""Nats that the same weights may differ by, measured in other batches."""
Setting = tuple[str, int]
"""Learning rate and passes."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Tunes the language model that sees no picture, and trains it with seeds.")
    parser.add_argument(
        "seeds",
        nargs="+",
        type=int,
        help="seeds that are trained with what seed 0 prefers: 0 1 2; 7 trainings, hours, but for what has a record",
    )
    parser.add_argument("--procs", default="1", help="ranks of a training (default 1: all weights learn, and two would send them all)")
    parser.add_argument("--check", type=Path, help="a document that must hold the table; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None:
        for rate in RATES:
            tune(rate, arguments.procs)
        for seed in arguments.seeds:
            train(best(), seed, arguments.procs)
    for record in sorted(RECORDS.glob("*/*.json")):
        run = RunDir(RUNS / record.parent.name / record.stem)
        if run.evaluation.exists():
            require_same(record, measured(run), run.path)
    return printed([table()], arguments.check)


def record_of(setting: Setting, seed: int) -> Path:
    """The file that keeps, by half, nats a token with their standard error over captions; `minutes` of training, `processor`."""
    return RECORDS / str(seed) / f"{_name(setting)}.json"


def recorded(seed: int) -> dict[str, Any]:
    """What a seed's control reached, with the setting that validation prefers."""
    return kept(record_of(best(), seed))


def run_of(setting: Setting, seed: int) -> RunDir:
    """Where such a run lies."""
    return RunDir(RUNS / str(seed) / _name(setting))


def config_of(setting: Setting, seed: int) -> Config:
    """The config with a setting."""
    rate, passes = setting
    where = f"run.dir={run_of(setting, seed).path}"
    return configure.load(CONFIG, [where, f"run.seed={seed}", f"train.lr={rate}", f"data.sources.captions.weight={passes}"])


def train(setting: Setting, seed: int, procs: str) -> None:
    """Trains and measures what has no record."""
    if record_of(setting, seed).exists():
        return
    print(f"\ncontrol: learning rate {setting[0]}, {setting[1]} passes, seed {seed}", flush=True)
    run = run_of(setting, seed)
    run_stage(config_of(setting, seed), {half: str(HELD_OUT / half) for half in HALVES}, procs)
    keep(record_of(setting, seed), measured(run))


def measured(run: RunDir) -> dict[str, Any]:
    """What the files of a run say."""
    splits = json.loads(run.evaluation.read_text())["splits"]
    found = {half: [splits[half]["nll_blind"], splits[half]["stderr"]["nll_blind"]] for half in HALVES}
    return {**found, "minutes": run.lived_s() / 60}


def tune(rate: str, procs: str) -> None:
    """Trains with seed 0, for twice as many passes until they are worse."""
    for passes in DOUBLED:
        train((rate, passes), 0, procs)
        if _is_worse(rate, passes):
            break


def tried(rate: str) -> dict[int, float]:
    """Nats a token on the validation half by passes.

    Raises:
        FileNotFoundError: some were not measured.
    """
    found: dict[int, float] = {}
    for passes in DOUBLED:
        found[passes] = _tuned(rate, passes)
        if _is_worse(rate, passes):
            break
    return found


def _is_worse(rate: str, passes: int) -> bool:
    """Than half of them."""
    return passes > 1 and _tuned(rate, passes) > _tuned(rate, passes // 2)


def _tuned(rate: str, passes: int) -> float:
    return kept(record_of((rate, passes), 0))["validation"][0]


def best() -> Setting:
    """The setting that is chosen."""
    nats = {(rate, passes): value for rate in RATES for passes, value in tried(rate).items()}
    return min(nats, key=nats.__getitem__)


def require_weights(seed: int) -> None:
    """What captions are compared with.

    Raises:
        UserError: it was not tuned; or the weights went with another machine: its record is not enough.
    """
    try:
        run, record = run_of(best(), seed), record_of(best(), seed)
    except FileNotFoundError as error:
        raise UserError(f"the control was not tuned: no {error.filename} (run control.py {seed})") from None
    if not run.final.exists():
        raise UserError(f"no control in {run.path} (delete {record}, and run control.py {seed})")


def require_difference(less: float, right: float, seed: int, cure: str) -> None:
    """A difference that is kept is to the control that is chosen now: captions weigh the same in both losses.

    Raises:
        UserError: it is to another one.
    """
    if abs(recorded(seed)["test"][0] - right - less) > ROUNDED:
        raise UserError(f"the difference of seed {seed} is to another control than is chosen now ({cure})")


def less_of(run: RunDir, seed: int) -> list[float]:
    """Nats a token that a test caption costs a run less behind its picture than the seed's control pays, and their standard error over
    captions: smaller than those of either loss, since captions differ more than models.
    """
    nll = []
    for path, figure in ((run_of(best(), seed).path, "blind"), (run.path, "right")):
        opened = open_model(path)
        scorer = Scorer(opened.model, opened.tokenizer, opened.config)
        nll.append(scorer.score(scorer.captions("test", HELD_OUT / "test", sys.maxsize)[figure]))
    less = Scores(nll[0].nll - nll[1].nll, nll[1].tokens)
    items = json.loads((HELD_OUT / "test" / "candidates.json").read_text())["items"]
    return [less.mean(), less.stderr([item["caption"] for item in items])]


def table() -> str:
    """A row a learning rate: passes and nats a token on the validation half; the chosen ones are bold."""
    lines = ["| learning rate | passes over the captions: nats a token on the validation half |", "|---|---|"]
    for rate in RATES:
        cells = [marked(f"{passes}: {nats:.3f}", (rate, passes) == best()) for passes, nats in tried(rate).items()]
        lines.append(f"| {rate} | {' · '.join(cells)} |")
    return "\n".join(lines)


def _name(setting: Setting) -> str:
    return f"{setting[0]}-{setting[1]}"


if __name__ == "__main__":
    exit_with(main)

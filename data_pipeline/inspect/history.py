"""What a run directory says about one step: where in the plan it began, which life did it, on how many ranks, with which costs.

Invariant: reads files by their documented names and fields, never guesses: what is not noted is walked to or refused with the cure, and
no cursor of another plan is taken.

    config.yaml                  the resolved config
    metrics.jsonl                `data/window`, `data/pack`: the cursor at which the line's step began
    lives.jsonl                  a start line has `world`, `sequence` (ranks that share packs; 1 where it is not noted), `plan` (digest),
                                 `origin` (where it took over) and `cost` (balance)
    checkpoints/*/state.json     `step` steps are done, the next begins at `cursor`
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from data_pipeline.errors import UserError
from data_pipeline.plan.balance import CostModel
from data_pipeline.plan.origin import Cursor, Origin


@dataclass(frozen=True)
class StepRecord:
    """One step as the run directory knows it."""

    step: int
    """As in metrics.jsonl and on the progress line: the first step is 1."""
    known_step: int
    """The nearest step up to `step` whose beginning is known."""
    known_cursor: Cursor
    """Where `known_step` begins."""
    life: int
    world: int
    """Ranks that had packs of their own: sequence groups, where ranks shared packs."""
    plan: str
    """Digest of the plan of that life."""
    origin: Origin
    """Where that plan took over from another one; the start of the run, as a rule."""
    cost: CostModel
    metrics: dict[str, Any]
    """Its line of metrics.jsonl; empty where it was never written, as of the step at which a life crashed."""


def find_step(run: Path, step: int) -> StepRecord:
    """The step as the newest life that did it left it.

    Raises:
        UserError: no such run or step, or it does not say what balance needs.
    """
    if step < 1:
        raise UserError(f"--step {step}: the first step is 1 (steps are counted as in {run / 'metrics.jsonl'})")
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run directory: no config.yaml in it (give the directory of run.dir)")
    lines = [line for line in jsonl.read(run / "metrics.jsonl") if "data/window" in line]
    metrics = next((line for line in reversed(lines) if line["step"] == step), {})
    starts = [event for event in jsonl.read(run / "lives.jsonl") if event["event"] == "start"]
    life = _life(run, starts, step, metrics.get("life"))
    same_plan = {start["life"] for start in starts if start.get("plan") == life["plan"]}
    states = [json.loads(file.read_text()) for file in run.glob("checkpoints/step-*/state.json")]
    origin = Origin(**life["origin"])
    known = {origin.step + 1: Cursor(origin.window, 0)}
    known |= {state["step"] + 1: Cursor(*state["cursor"]) for state in states if state["plan_digest"] == life["plan"]}
    known |= {line["step"]: Cursor(line["data/window"], line["data/pack"]) for line in lines if line["life"] in same_plan}
    nearest = max(s for s in known if s <= step)
    world, plan, cost = life["world"] // life.get("sequence", 1), life["plan"], CostModel(**life["cost"])
    return StepRecord(step, nearest, known[nearest], life["life"], world, plan, origin, cost, metrics)


def _life(run: Path, starts: list[dict[str, Any]], step: int, number: int | None) -> dict[str, Any]:
    """Start line of the life `number`, or of the newest one that went past the step's beginning."""
    mine = [s for s in starts if (s["life"] == number if number else (s["resumed_from"] or 0) < step)]
    if not mine or "cost" not in mine[-1]:
        raise UserError(
            f"{run / 'lives.jsonl'}: no life notes the plan and the costs of step {step} "
            "(the run has not begun, or was begun by an older version: xc-data preview shows its first packs)"
        )
    return mine[-1]

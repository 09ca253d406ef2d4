"""What the small model's programs share: a training that goes on where it stopped, the record of what it reached, and the check that a
document says what the records say.

Invariant: a record is written whole, and a document is held against it line for line.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.command_line import command_line
from data_pipeline.errors import UserError
from train import configure
from train.config import Config, EvaluateConfig
from train.device import cpu_name
from train.run_dir import write_atomic, write_json

RESULTS = Path("docs/results")
HELD_OUT = Path("runs/small/data/heldout")
BIN = Path(sys.executable).parent


def run_stage(config: Config, splits: dict[str, str], procs: str) -> None:
    """Trains a stage with a config that is kept beside its run directory, and measures these held-out pairs. One that ended is passed
    over, what was interrupted goes on, and what another config trained is refused.
    """
    config.track.wandb = False
    config.evaluate = EvaluateConfig(splits=splits)
    file = Path(config.run.dir).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, configure.to_yaml(config).encode())
    end_where_it_fails(BIN / "xc-train", "run", file, "--procs", procs)


def end_where_it_fails(*command: str | Path) -> None:
    """Runs a command of ours.

    Raises:
        SystemExit: with its code; it has said why.
    """
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(code)


def keep(record: Path, found: dict[str, Any]) -> None:
    """Writes a record, with the processor that this is."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"processor": cpu_name(), **found})


def kept(record: Path) -> dict[str, Any]:
    """What a record holds.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    try:
        return json.loads(record.read_text())
    except ValueError:
        raise UserError(f"{record} is no JSON (take it from git again, or delete it to have it measured anew)") from None


def require_same(record: Path, found: dict[str, Any], run: Path) -> None:
    """A record says what a run directory says that is there.

    Raises:
        UserError: it does not.
    """
    if kept(record) != kept(record) | found:
        raise UserError(f"{record} does not say what {run} says (delete it to have it written anew)")


def shown(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of an evaluation, without their pictures."""
    return [{key: value for key, value in sample.items() if key != "image"} for sample in samples]


def printed(tables: Sequence[str], document: Path | None) -> int:
    """Prints tables; 1 if there is a document that does not hold them all, line for line and nothing behind them, else 0."""
    print("\n" + "\n\n".join(tables))
    if document is None:
        return 0
    if not document.exists():
        raise UserError(f"no document {document} (mend the path)")
    held = re.findall(r"(?:^\|.*\n?)+", document.read_text(), re.M)
    missing = [table for table in tables if table not in [block.rstrip("\n") for block in held]]
    for table in missing:
        print(f"error: {document} does not hold the table that begins {table.splitlines()[0]} (put it there)", file=sys.stderr)
    return 1 if missing else 0


def sample_table(samples: list[dict[str, Any]]) -> str:
    """What a model writes about the first test pictures by SHA-256 of their key, and which of ten captions it prefers."""
    lines = ["| picture | its caption | written | chosen of ten |", "|---|---|---|---|"]
    for s in samples:
        cells = (s["key"], s["reference"], marked(s["generated"], s["generated_right"]), marked(s["retrieved"], s["retrieved_right"]))
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """A row of a table: what a model writes may hold bars and newlines."""
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"


def marked(words: str, right: bool) -> str:
    """Bold where it is right."""
    return f"**{words.strip()}**" if right else words


def exit_with(program: Callable[[], int]) -> None:
    """Ends the process with the program's exit code; what is missing is said in one line."""

    def run() -> int:
        try:
            return program()
        except FileNotFoundError as error:
            cure = "without --check the same command makes and measures what is missing, behind make small-data"
            raise UserError(f"no {error.filename} ({cure})") from None

    sys.exit(command_line(run))

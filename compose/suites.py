"""`xc-compose eval`: a suite of questions with known answers, asked of one model, as a table.

Invariant: data are checked before a model is loaded; every figure stands beside what knowing nothing would give, and says from how many
questions it comes. The same weights and data give the same tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compose import assistant, choices, places
from compose.page import require_writable
from compose.pictures import Picture
from data_pipeline.errors import UserError
from data_pipeline.shards.source import ShardSource
from train.config import Stage
from train.evaluate import Scorer, Scores, evaluate_key, share_stderr
from train.held_out import read_candidates
from train.run_dir import write_atomic, write_json
from train.weights import exported
from train.weights.opened import Opened, first_weights, open_model, read_config, require_weights

PAIRS = "candidates.json"


class Row(NamedTuple):
    """A figure."""

    figure: str
    value: float
    stderr: float | None = None
    beside: float | None = None
    """What it is to be compared with."""
    meaning: str = ""
    """Of `beside`."""
    count: int = 0
    """Questions, pictures, paragraphs."""


@dataclass(frozen=True)
class Table:
    """Figures of one source of questions."""

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a suite measured."""

    suite: str
    checkpoint: str
    weights: str
    stage: str
    step: int | None
    tables: list[Table]

    def markdown(self) -> str:
        """For people."""
        step = "" if self.step is None else f", step {self.step}"
        lines = [f"# {self.suite}: {self.checkpoint} (stage {self.stage}{step})"]
        for table in self.tables:
            lines += ["", f"## {table.name}", "| figure | value | ± | to compare with | | of |", "|---|---|---|---|---|---|"]
            for row in table.rows:
                cells = [_number(row.value), _number(row.stderr), _number(row.beside), row.meaning, str(row.count)]
                lines.append(f"| {' | '.join([row.figure, *cells])} |")
            lines += [f"\n{note}" for note in table.notes]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        tables = [{"name": t.name, "rows": [row._asdict() for row in t.rows], "notes": t.notes} for t in self.tables]
        return {**asdict(self), "tables": tables}


def run(suite: str, checkpoint: Path, data: Path | None, base: Path | None) -> Result:
    """Measures a model.

    Raises:
        UserError: no such model, or the suite's data are missing or wrong.
    """
    if base and suite != "text":
        raise UserError(f"--base belongs to --suite text, not {suite} (drop it)")
    prepared = _SUITES[suite](checkpoint, data, base)
    opened = open_model(checkpoint)
    stage = opened.config.run.stage
    return Result(suite, str(checkpoint), opened.weights, stage.value, opened.step, prepared(opened))


def check_output(output: Path | None) -> None:
    """Refuses a file that is no .json, or that would replace one.

    Raises:
        UserError: it is.
    """
    if output is None:
        return
    if output.suffix != ".json":
        named = output / "NAME.json" if output.is_dir() else output.with_suffix(".json")
        raise UserError(f"-o {output}: tables go to a .json, and to a .md beside it (give {named})")
    require_writable(output, output.with_suffix(".md"))


def write(result: Result, output: Path) -> None:
    """Writes the tables as JSON, and as Markdown beside it.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        write_json(output, result.as_json())
        write_atomic(output.with_suffix(".md"), result.markdown().encode())
    except OSError as error:
        raise UserError(f"cannot write {output.absolute()}: {error.strerror} (choose another -o)") from None


Measure = Callable[[Opened], list[Table]]


def _captions(checkpoint: Path, data: Path | None, base: Path | None) -> Measure:
    splits = {data.name: data} if data else {name: Path(folder) for name, folder in read_config(checkpoint).evaluate.splits.items()}
    if not splits:
        raise UserError(f"{checkpoint} names no held-out pairs (give --data FOLDER, with shards, index and {PAIRS})")
    for name, folder in splits.items():
        if not (folder / PAIRS).exists():
            raise UserError(f"no {PAIRS} in {folder.absolute()} (give --data FOLDER, with shards, index and {PAIRS})")
        source = ShardSource(name, folder, key="--data" if data else evaluate_key(name))
        read_candidates(source)
        source.require_tokenizer(assistant.prompter(checkpoint).tokenizer.digest)

    def measure(opened: Opened) -> list[Table]:
        scorer = Scorer(opened.model, opened.tokenizer, opened.config)
        return [_caption_table(scorer, name, folder) for name, folder in splits.items()]

    return measure


def _caption_table(scorer: Scorer, name: str, folder: Path) -> Table:
    found = scorer.split(name, folder)
    count, stderr = found["pictures"], found["stderr"]

    def row(figure: str, beside: float | None = None, meaning: str = "") -> Row:
        return Row(figure, found[figure], stderr[figure], beside, meaning, count)

    rows = [row("nll_blind")]
    if scorer.config.run.stage is not Stage.language:
        rows = [row("nll_right", found["nll_wrong"], "behind a wrong picture"), *rows]
        rows += [row("wrong_minus_right", 0.0, "a model that sees nothing"), row("blind_minus_right", 0.0, "the same")]
        rows.append(row("retrieval_of_10", found["retrieval_by_guessing"], "guessing"))
        rows.append(row("picture_of_10", found["picture_by_guessing"], "guessing"))
        rows.append(row("greedy_exact"))
    return Table(name, rows)


def _text(checkpoint: Path, data: Path | None, base: Path | None) -> Measure:
    named = data or read_config(checkpoint).evaluate.text
    if not named:
        raise UserError(f"{checkpoint} names no held-out text (give --data FOLDER, an indexed source of plain text)")
    folder = Path(named)
    source = ShardSource("text", folder, key="--data" if data else evaluate_key("text"))
    if base is None and exported.is_export(checkpoint):
        raise UserError(f"{checkpoint} is an export, which does not know what its stage began from (give --base)")
    tokenizer = assistant.prompter(checkpoint).tokenizer
    source.require_tokenizer(tokenizer.digest)
    if base:
        require_weights(base)
    if base and assistant.prompter(base).tokenizer.digest != tokenizer.digest:
        raise UserError(f"--base {base} has another tokenizer: losses a token cannot be compared (give the model's own base)")

    def measure(opened: Opened) -> list[Table]:
        ours, digest = _read_text(opened, folder)
        began = open_model(base) if base else first_weights(opened.config)
        theirs, base_digest = _read_text(began, folder)
        change = Scores(ours.nll - theirs.nll, ours.tokens)
        rows = [
            Row("nll", ours.mean(), ours.stderr(), theirs.mean(), "the base model", len(ours.nll)),
            Row("minus_base", change.mean(), change.stderr(), 0.0, "a language that is kept", len(ours.nll)),
        ]
        same = "are the base model's to the last bit" if digest == base_digest else "differ from the base model's"
        return [Table(folder.name, rows, [f"Logits {same}."])]

    return measure


def _read_text(opened: Opened, folder: Path) -> tuple[Scores, str]:
    scorer = Scorer(opened.model, opened.tokenizer, opened.config)
    return scorer.read(scorer.texts(folder))


def _choices(checkpoint: Path, data: Path | None, base: Path | None) -> Measure:
    if data is None:
        raise UserError("--suite choices needs questions (give --data FILE.jsonl, in the layout of MMBench or SEED-Bench)")
    questions = choices.read(data)
    prompter = assistant.prompter(checkpoint)
    if any(isinstance(part, Picture) for question in questions for part in question.parts):
        prompter.require_sight()
    fitting = [prompter.fits(assistant.ask(*question.parts)) for question in questions]

    def measure(opened: Opened) -> list[Table]:
        asked = assistant.of(opened)
        right = np.asarray(
            [
                fit and asked.likeliest(assistant.ask(*q.parts), choices.LETTERS[: q.options]) == q.answer
                for q, fit in zip(questions, fitting, strict=True)
            ],
        )
        by = {"all": np.ones(len(questions), bool)}
        by |= {name: np.asarray([q.category == name for q in questions]) for name in dict.fromkeys(q.category for q in questions)}
        guess = np.asarray([1 / q.options for q in questions])
        too_long = f"{fitting.count(False)} questions do not fit the context of {asked.context} tokens and count as wrong."
        rows = [_share(name, right[of], float(guess[of].mean())) for name, of in by.items()]
        return [Table(data.name, rows, [] if all(fitting) else [too_long])]

    return measure


def _composition(checkpoint: Path, data: Path | None, base: Path | None) -> Measure:
    if data is None:
        raise UserError("--suite composition needs documents (give --data FOLDER, an indexed source of documents)")
    pages = places.read(data)
    assistant.prompter(checkpoint).require_sight()

    def measure(opened: Opened) -> list[Table]:
        asked = assistant.of(opened)
        found = places.measure(asked, Scorer(opened.model, opened.tokenizer, opened.config), pages)
        pages_asked = len(found.lines)
        rows = []
        if pages_asked:
            rows.append(
                Row(
                    "lines_f1",
                    float(found.lines.mean()),
                    share_stderr(found.lines),
                    float(found.evenly.mean()),
                    "spread evenly",
                    pages_asked,
                )
            )
            rows.append(_share("lines_as_asked", found.as_asked, None))
        rows += [
            _share(name, np.asarray(hits.right), 1 / places.OPTIONS, hits.pages)
            for name, hits in (("caption_of_4", found.captions), ("picture_of_4", found.pictures))
            if hits.pages
        ]
        return [Table(data.name, rows, [f"{found.left_out} questions did not fit the context of {asked.context} tokens."])]

    return measure


_SUITES = {"captions": _captions, "text": _text, "choices": _choices, "composition": _composition}


def _share(name: str, hits: np.ndarray, guess: float | None, of: Sequence[str] | None = None) -> Row:
    return Row(name, float(hits.mean()), share_stderr(hits, of), guess, "guessing" if guess is not None else "", len(hits))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

"""The small model through all three stages, with half of the pretraining of results.py: tables and articles of docs/results.md.

Invariant: nothing shown is picked by hand: pictures and pages are the first held out ones by SHA-256 of their names. Every figure is
read from files of run directories into the record docs/results/stages.json; where there is one, nothing is trained: delete it and the
stages' run directories to measure anew. `--check` fails where the document says something else than the record, or the record than
run directories that are there.

    make small-data
    python examples/small/three_stages.py                                 (an hour on two cores with bf16, two and a half without)
    python examples/small/three_stages.py --check docs/results.md
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from records import (
    BIN,
    HELD_OUT,
    RESULTS,
    end_where_it_fails,
    exit_with,
    keep,
    kept,
    printed,
    require_same,
    row,
    run_stage,
    sample_table,
    shown,
)

from compose import places
from train import configure
from train.run_dir import RunDir

RECORD = RESULTS / "stages.json"
RUNS = Path("runs/small/stages")
STAGES = {
    "pretrain": ["data.sources.pairs.weight=3"],
    "sft": [f"run.init_from={RUNS / 'pretrain'}"],
    "compose": [f"run.init_from={RUNS / 'sft'}"],
}
"""Overrides of each stage's config."""
PROCS = {"pretrain": "2", "sft": "1", "compose": "1"}
"""Ranks: where all weights learn, one takes up to 16 GB with its data worker, and two would send each other all gradients."""
PAGES = HELD_OUT / "documents"
COLLECTION = RUNS / "collection"
ARTICLES = 3
SUITES = {
    ("sft", "text"): ("--data", HELD_OUT / "text", "--base", RUNS / "pretrain"),
    ("sft", "composition"): ("--data", PAGES),
    ("compose", "text"): ("--data", HELD_OUT / "text", "--base", RUNS / "pretrain"),
    ("compose", "composition"): ("--data", PAGES),
}
"""Suites of `xc-compose eval` by stage, and their data. Pretraining keeps the language; captions are measured by the training itself."""
ROWS = {
    ("captions", "retrieval_of_10"): "caption of its picture, among ten",
    ("captions", "picture_of_10"): "picture of its caption, among ten",
    ("captions", "nll_right"): "nats a token of a caption, behind its picture",
    ("captions", "nll_wrong"): "behind a wrong picture",
    ("captions", "greedy_exact"): "greedy captions that are exactly right",
    ("text", "minus_base"): "change of nats a token on text alone",
    ("composition", "lines_f1"): "lines that pictures follow (F1)",
    ("composition", "lines_as_asked"): "answers to that in the form asked for",
    ("composition", "caption_of_4"): "caption of a figure, among four, by the text before it",
    ("composition", "picture_of_4"): "figure of a caption, among four",
}
"""Suite and figure; what the table calls it."""


def main() -> int:
    """Returns the exit code."""
    about = "The small model's three stages, as the tables and articles of docs/results.md. Trains for hours, unless they have a record."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", type=Path, help="a document that must hold the tables; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None and not RECORD.exists():
        for stage in STAGES:
            train(stage)
        measure()
        keep(RECORD, measured())
    record = kept(RECORD)
    if all(article_of(number).exists() for number in range(ARTICLES)):
        require_same(RECORD, measured(), RUNS)
    return printed((figures(record), sample_table(record["samples"]), articles(record)), arguments.check)


def train(stage: str) -> None:
    """Trains what has not ended yet; what was interrupted goes on. Stages that learn captions are measured on the test pairs."""
    config = configure.load(Path(f"configs/small/{stage}.yaml"), [*STAGES[stage], f"run.dir={RUNS / stage}"])
    run_stage(config, {} if stage == "compose" else {"test": str(HELD_OUT / "test")}, PROCS[stage])


def measure() -> None:
    """Asks what has not been asked yet, and writes the articles."""
    for (stage, suite), data in SUITES.items():
        out = tables_of(stage, suite)
        if not out.exists():
            end_where_it_fails(BIN / "xc-compose", "eval", out.parent, "--suite", suite, *data, "-o", out)
    if not COLLECTION.exists():
        end_where_it_fails(BIN / "xc-compose", "collection", "build", "runs/small/data/figures", "-o", COLLECTION)
    pages = sorted(places.read(PAGES), key=lambda page: hashlib.sha256(page.name.encode()).digest())
    for number, page in enumerate(pages[:ARTICLES]):
        if not article_of(number).exists():
            article_of(number).with_suffix(".json").unlink(missing_ok=True)  # of one that was cut off
            asked = ("--instruction", f"Explain: {page.title}", "--collection", COLLECTION, "-o", article_of(number))
            end_where_it_fails(BIN / "xc-compose", "article", RUNS / "compose", *asked)


def tables_of(stage: str, suite: str) -> Path:
    """Where a suite's tables lie."""
    return RUNS / stage / f"{suite}.json"


def article_of(number: int) -> Path:
    """Where an article lies; its steps lie beside it."""
    return RUNS / "compose" / f"article-{number}.html"


def measured() -> dict[str, Any]:
    """`figures` by stage and suite, each with its standard error, what it is to be compared with and, of suites, how many it is of;
    `samples`, `articles`.
    """
    found: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for stage in ("pretrain", "sft"):
        test = json.loads(RunDir(RUNS / stage).evaluation.read_text())["splits"]["test"]
        found[stage]["captions"] = {figure: [test[figure], test["stderr"][figure], None] for of, figure in ROWS if of == "captions"}
    for stage, suite in SUITES:
        rows = json.loads(tables_of(stage, suite).read_text())["tables"][0]["rows"]
        found[stage][suite] = {row["figure"]: [row["value"], row["stderr"], row["beside"], row["count"]] for row in rows}
    for stage in STAGES:
        found[stage]["minutes"] = RunDir(RUNS / stage).lived_s() / 60
    written = [json.loads(article_of(number).with_suffix(".json").read_text()) for number in range(ARTICLES)]
    kept = [{key: article[key] for key in ("instruction", "made_with", "article", "steps")} for article in written]
    samples = json.loads(RunDir(RUNS / "sft").evaluation.read_text())["splits"]["test"]["samples"]
    return {"figures": found, "samples": shown(samples), "articles": kept}


def figures(record: dict[str, Any]) -> str:
    """A column a stage."""
    stages = record["figures"]
    lines = [f"| | {' | '.join(stages)} | to compare with |", "|---" * (len(stages) + 2) + "|"]
    for (suite, figure), words in ROWS.items():
        cells, beside = [], ""
        for found in stages.values():
            value, stderr, guess, *_ = found.get(suite, {}).get(figure, (None, None, None))
            cells.append("" if value is None else f"{value:.3f}" + (f" ± {stderr:.3f}" if stderr else ""))
            beside = beside if guess is None else f"{guess:.3f}"
        lines.append(f"| {words} | {' | '.join(cells)} | {beside} |")
    minutes = [f"{found['minutes']:.1f}" for found in stages.values()]
    return "\n".join([*lines, f"| minutes of training, {record['processor']} | {' | '.join(minutes)} | |"])


def articles(record: dict[str, Any]) -> str:
    """A row an article: what was asked, how it begins, its pictures' captions, and how many of the model's answers carry a remark, as a
    rule that they were not in the form asked for.
    """
    lines = ["| asked | title written | first paragraph | captions of its pictures | answers with a remark |", "|---|---|---|---|---|"]
    for made in record["articles"]:
        text, answers = made["article"], [step for step in made["steps"] if step["step"] != "retrieve"]
        pictures = "; ".join(picture["caption"] for picture in text["pictures"])
        cells = (
            made["instruction"],
            text["title"],
            text["lines"][0],
            pictures,
            f"{sum(step['fallback'] is not None for step in answers)} of {len(answers)}",
        )
        lines.append(row(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)

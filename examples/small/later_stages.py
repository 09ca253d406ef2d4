"""What SFT and the composition stage make of the small model behind a seed's pretraining: tables, answers and articles of docs/results.md.

Invariant: nothing shown is picked by hand: pictures and pages are the first held out ones by SHA-256 of their names. Every figure is
read from files of run directories into the record docs/results/stages.json; where there is one, nothing is trained: delete it and the
stages' run directories to measure anew. `--check` fails where the document says something else than the record, or the record than
run directories that are there.

    python examples/small/results.py 0
    python examples/small/later_stages.py                                 (an hour and a half on two quiet cores)
    python examples/small/later_stages.py --check docs/results.md
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from results import BIN, HELD_OUT, RECORDS, RUNS, end_where_it_fails, exit_with, keep, printed, record_of, sample_table, shown

from compose import places
from data_pipeline.errors import UserError
from train import configure
from train.run_dir import RunDir, write_atomic

RECORD = RECORDS / "stages.json"
SEED = RUNS / "0"
BEGINS_FROM = {"sft": "pretrain", "compose": "sft"}
PAGES = HELD_OUT / "documents"
COLLECTION = Path("runs/small/figures")
ARTICLES = 3
SUITES = {
    "text": ("--data", HELD_OUT / "text", "--base", SEED / "pretrain"),
    "composition": ("--data", PAGES),
}
"""Suites of `xc-compose eval`, and their data. Pretraining leaves the language as it was; captions are measured by the training itself."""
ROWS = {
    ("captions", "retrieval_of_10"): "caption of its picture, among ten",
    ("captions", "picture_of_10"): "picture of its caption, among ten",
    ("captions", "nll_right"): "nats a token of a caption, behind its picture",
    ("captions", "nll_wrong"): "behind a wrong picture",
    ("text", "minus_base"): "change of nats a token on text alone",
    ("composition", "lines_f1"): "lines that pictures follow (F1)",
    ("composition", "lines_as_asked"): "answers to that in the form asked for",
    ("composition", "caption_of_4"): "caption of a figure, among four",
    ("composition", "picture_of_4"): "figure of a caption, among four",
}
"""Suite and figure; what the table calls it."""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="SFT and composition behind the small model's pretraining, as the tables of docs/results.md."
    )
    parser.add_argument("--procs", default="1", help="ranks of a training (default 1: where all weights learn, two took more than 24 GB)")
    parser.add_argument("--check", type=Path, help="a document that must hold the tables; nothing is trained")
    arguments = parser.parse_args()
    if arguments.check is None and not RECORD.exists():
        for stage in BEGINS_FROM:
            train(stage, arguments.procs)
        measure()
        keep(RECORD, measured())
    record = json.loads(RECORD.read_text())
    if all(article_of(number).exists() for number in range(ARTICLES)) and record != record | measured():
        print(f"error: {RECORD} does not say what {SEED} says (delete it to have it written anew)", file=sys.stderr)
        return 1
    return printed((figures(record), sample_table(record["samples"]), articles(record)), arguments.check)


def train(stage: str, procs: str) -> None:
    """Trains what has not ended yet; what was interrupted goes on. Of held-out pairs only the test half is measured, behind SFT."""
    run, before = SEED / stage, RunDir(SEED / BEGINS_FROM[stage])
    if not before.final.exists():
        record = record_of(int(SEED.name))
        raise UserError(f"{before.path} holds no finished run (train it: python examples/small/results.py {SEED.name}, without {record})")
    always = [f"run.dir={run}", f"run.init_from={before.path}", "track.wandb=false"]
    config = configure.load(Path(f"configs/small/{stage}.yaml"), always)
    config.evaluate.splits = {"test": str(HELD_OUT / "test")} if stage == "sft" else {}
    config.evaluate.text = None
    file = run.with_suffix(".yaml")
    write_atomic(file, configure.to_yaml(config).encode())
    end_where_it_fails(BIN / "xc-train", "run", file, "--procs", procs)


def measure() -> None:
    """Asks what has not been asked yet, and writes the articles."""
    for suite, data in SUITES.items():
        for out in (tables_of(stage, suite) for stage in BEGINS_FROM):
            if not out.exists():
                end_where_it_fails(BIN / "xc-compose", "eval", out.parent, "--suite", suite, *data, "-o", out)
    if not COLLECTION.exists():
        end_where_it_fails(BIN / "xc-compose", "collection", "build", "runs/small/data/figures", "-o", COLLECTION)
    pages = sorted(places.read(PAGES), key=lambda page: hashlib.sha256(page.name.encode()).digest())
    for number, page in enumerate(pages[:ARTICLES]):
        if not article_of(number).exists():
            article_of(number).with_suffix(".json").unlink(missing_ok=True)  # of one that was cut off
            asked = ("--instruction", f"Explain: {page.title}", "--collection", COLLECTION, "-o", article_of(number))
            end_where_it_fails(BIN / "xc-compose", "article", SEED / "compose", *asked)


def tables_of(stage: str, suite: str) -> Path:
    """Where a suite's tables lie."""
    return SEED / stage / f"{suite}.json"


def article_of(number: int) -> Path:
    """Where an article lies; its steps lie beside it."""
    return SEED / "compose" / f"article-{number}.html"


def measured() -> dict[str, Any]:
    """`figures` by stage and suite, each with its standard error and what it is to be compared with; `samples`, `articles`."""
    found: dict[str, dict[str, Any]] = {stage: {} for stage in ("pretrain", *BEGINS_FROM)}
    for stage in ("pretrain", "sft"):
        test = json.loads(RunDir(SEED / stage).evaluation.read_text())["splits"]["test"]
        found[stage]["captions"] = {figure: [test[figure], test["stderr"][figure], None] for of, figure in ROWS if of == "captions"}
    for stage in BEGINS_FROM:
        for suite in SUITES:
            rows = json.loads(tables_of(stage, suite).read_text())["tables"][0]["rows"]
            found[stage][suite] = {row["figure"]: [row["value"], row["stderr"], row["beside"]] for row in rows}
        found[stage]["minutes"] = RunDir(SEED / stage).lived_s() / 60
    written = [json.loads(article_of(number).with_suffix(".json").read_text()) for number in range(ARTICLES)]
    kept = [{key: article[key] for key in ("instruction", "article", "steps")} for article in written]
    samples = json.loads(RunDir(SEED / "sft").evaluation.read_text())["splits"]["test"]["samples"]
    return {"figures": found, "samples": shown(samples), "articles": kept}


def figures(record: dict[str, Any]) -> str:
    """A column a stage."""
    stages = record["figures"]
    lines = [f"| | {' | '.join(stages)} | without a model that knows |", "|---" * (len(stages) + 2) + "|"]
    for (suite, figure), words in ROWS.items():
        cells, beside = [], ""
        for found in stages.values():
            value, stderr, guess = found.get(suite, {}).get(figure, (None, None, None))
            cells.append("" if value is None else f"{value:.3f}" + (f" ± {stderr:.3f}" if stderr else ""))
            beside = beside if guess is None else f"{guess:.3f}"
        lines.append(f"| {words} | {' | '.join(cells)} | {beside} |")
    minutes = [f"{found['minutes']:.1f}" if "minutes" in found else "" for found in stages.values()]
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
        lines.append(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)

"""The small model's documents say what its run directories say."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "small"))
    monkeypatch.chdir(tmp_path)


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def lived(run: Path, seconds: int) -> None:
    events = [{"event": "start", "life": 1, "time": 0}, {"event": "end", "life": 1, "time": seconds}]
    (run / "lives.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def write_seed(seed: int) -> None:
    """Figures that tell seeds apart, where results.py finds them."""
    from results import ALIKE, FIGURES, HELD_OUT, RUNS

    item = {"caption": "tool: saw", "candidates": ["tool: saw", "animal: bull", "tool: axe", "plant: oak"]}
    for half in (HELD_OUT / "test", ALIKE):
        write(half / "candidates.json", {"items": [item, {**item, "caption": "plant: oak"}]})
    split = dict.fromkeys(FIGURES, 0.5 + seed / 100) | {"nll_blind": 4.0}
    sample = {"key": "k|1", "reference": "a saw", "generated": "a saw", "generated_right": True, "retrieved": "a bull"}
    split |= {"stderr": dict.fromkeys(split, 0.02), "samples": [sample | {"retrieved_right": False}]}
    for stage in ("blind", "pretrain"):
        write(RUNS / str(seed) / stage / "evaluation.json", {"splits": {"test": split}})
    write(RUNS / str(seed) / "pretrain" / "text.json", {"tables": [{"notes": ["Logits are the same."]}]})
    rows = [{"figure": f, "value": 0.3, "stderr": 0.02} for f in ("retrieval_of_10", "picture_of_10")]
    write(RUNS / str(seed) / "pretrain" / "alike.json", {"tables": [{"rows": rows}]})
    lived(RUNS / str(seed) / "pretrain", 600)


def check(monkeypatch, program, document: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["program", "0", "1", "--check", str(document)])
    return program.main()


def test_the_check_of_results_fails_where_the_document_says_something_else(monkeypatch, tmp_path, capsys):
    import results

    for seed in (0, 1):
        write_seed(seed)
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\n{results.figures([0, 1])}\n\n{results.samples(0)}\n")
    assert check(monkeypatch, results, document) == 0
    said = document.read_text()
    assert "| 0.500 ± 0.020 | 0.510 ± 0.020 | **0.505** |" in said and "| 10.000 | 10.000 | **10.000** |" in said
    assert "| caption among ten that are alike | 0.300 ± 0.020 | 0.300 ± 0.020 | **0.300** |" in said
    assert "by guessing among those of the right category | 0.750 | 0.750 | **0.750** |" in said
    assert "| k/1 | a saw | **a saw** | a bull |" in said
    document.write_text(said.replace("0.510", "0.610"))
    assert check(monkeypatch, results, document) == 1
    assert "does not hold this table" in capsys.readouterr().err


def test_an_arm_of_the_ablation_takes_the_rate_that_validation_prefers(monkeypatch, tmp_path):
    import ablation

    for arm, rates in ablation.RATES.items():
        for number, rate in enumerate(rates):
            write(ablation.RUNS / "tuning" / f"{arm}-{rate}" / "validation.json", {"nll_right": 4.0 + abs(number - 1)})
        for seed in (0, 1):
            run = ablation.RUNS / str(seed) / arm
            rows = {suite: [{"figure": f, "value": 0.5 + seed} for s, f in ablation.COLUMNS if s == suite] for suite in ablation.SUITES}
            for suite in ablation.SUITES:
                write(run / f"{suite}.json", {"tables": [{"rows": rows[suite]}]})
            lived(run, 600)
    for seed in (0, 1):
        write_seed(seed)
    assert [ablation.best_rate(arm) for arm in ablation.RATES] == [rates[1] for rates in ablation.RATES.values()]
    document = tmp_path / "ablation.md"
    document.write_text(f"{ablation.tuning_table()}\n\n{ablation.outcome_table([0, 1])}")
    assert check(monkeypatch, ablation, document) == 0
    said = document.read_text()
    assert "5e-4: 5.000 · **1e-3: 4.000** · 2e-3: 5.000" in said and "| 1.000 ± 0.707 |" in said
    document.write_text(said.replace("0.707", "0.0"))
    assert check(monkeypatch, ablation, document) == 1


def test_a_check_without_runs_trains_nothing(monkeypatch, tmp_path):
    import ablation
    import results

    document = tmp_path / "document.md"
    document.write_text("# Figures\n")
    for program in (results, ablation):
        with pytest.raises(FileNotFoundError):
            check(monkeypatch, program, document)
    assert [file.name for file in tmp_path.iterdir()] == ["document.md"]

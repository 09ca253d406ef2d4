"""Error budgets and the ledger: what is dropped is charged to its source, survives a resume, and becomes a selection that does without."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from demo_data import SEED, START, data_config, run
from hypothesis import given
from hypothesis import strategies as st
from tars import overwrite

from data_pipeline.config import ErrorConfig, SourceConfig
from data_pipeline.errors import UserError
from data_pipeline.opened import open_data
from data_pipeline.read import budget
from data_pipeline.read.ledger import BadEntry, Ledger, copy_index_damage, read_ledger
from data_pipeline.shards.index import read_index, sidecar_path

NAMES = ("a", "b")


@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=40),
    share=st.sampled_from((0.0, 0.1, 0.25, 1.0)),
    segments=st.integers(1, 30),
    total=st.none() | st.integers(0, 20),
    cut=st.integers(0, 40),
)
def test_a_run_stops_at_the_first_step_whose_stretch_or_total_is_over_budget_also_when_resumed(steps, share, segments, total, cut):
    budgets = dict.fromkeys(NAMES, ErrorConfig(share, segments, total))
    totals: dict[str, int] = {}
    stretch, whole = {n: [0, 0] for n in NAMES}, Counter()
    for number, (seen_a, seen_b, lost_a, lost_b) in enumerate(steps):
        if number == cut:
            totals = json.loads(json.dumps(totals))  # as a checkpoint keeps them
        agreed = [seen_a, seen_b, min(lost_a, seen_a), min(lost_b, seen_b)]
        totals = budget.charged(totals, budgets, agreed)
        over = set()
        for i, name in enumerate(NAMES):
            if stretch[name][0] >= segments:
                stretch[name] = [0, 0]
            stretch[name][0] += agreed[i]
            stretch[name][1] += agreed[2 + i]
            whole[name] += agreed[2 + i]
            if stretch[name][1] > share * segments + 1e-9 or (total is not None and whole[name] > total):
                over.add(name)
        found = budget.overdrawn(totals, budgets)
        assert (found is None) == (not over)
        assert found is None or any(f"source {name} " in found and f"data.sources.{name}.errors" in found for name in over)


def test_ranks_together_charge_every_planned_and_dropped_segment_once(demo, tmp_path):
    demo.copy(".", tmp_path / "demo")
    shard = tmp_path / "demo" / "text" / "train-000000.tar"
    for row in read_index(sidecar_path(shard, shard.parent)).table.to_pylist()[::3]:
        overwrite(shard, row["members"][0]["offset"], b"zz")
    config = data_config(tmp_path / "demo")
    names = list(config.sources)
    expected = Counter()
    worlds = []
    for ranks in (1, 3):
        agreed = Counter()
        for rank in range(ranks):
            for _, step in zip(range(6), run(config, rank, ranks), strict=False):
                agreed.update(dict(enumerate(budget.charges(step, names))))
                expected.update(f"{e.source} dropped" for e in step.bad)
        worlds.append(agreed)
    assert worlds[0] == worlds[1]
    data, cursor, planned = open_data(config, SEED), START, Counter()
    for _ in range(6):
        batch = data.plan.global_batch(cursor)
        cursor = batch.cursor
        planned.update(names[s] for pack in batch.packs for s in pack.source.tolist())
    assert {name: worlds[0][i] for i, name in enumerate(names)} == dict(planned)
    assert worlds[0][3 + names.index("text")] * 2 == expected["text dropped"] > 0
    assert worlds[0][3 + names.index("pairs")] == 0


@pytest.mark.parametrize("errors", [{"share": 1.5}, {"share": -0.1}, {"segments": 0}, {"total": -1}])
def test_a_budget_that_counts_nothing_is_a_user_error(demo, errors):
    config = data_config(demo.root)
    config.sources["text"].errors = ErrorConfig(**errors)
    with pytest.raises(UserError, match=r"data\.sources\.text\.errors"):
        open_data(config, SEED)


@pytest.fixture
def ended_run(demo, tmp_path) -> Path:
    """A run directory over a copy of the demo, whose ledger has two dropped samples of text, one of them twice."""
    root = tmp_path / "demo"
    demo.copy(".", root)
    config = data_config(root)
    (tmp_path / "run").mkdir()
    sources = {name: {"path": source.path} for name, source in config.sources.items()}
    data = {"tokenizer": config.tokenizer, "sources": sources, "unit": "epochs", "context": 256, "global_batch": 8}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    rows = read_index(sidecar_path(root / "text" / "train-000000.tar", root / "text")).table.to_pylist()
    entries = [
        BadEntry("text", "train-000000.tar", rows[i]["key"], rows[i]["offset"], rows[i]["size"], f"bytes changed: {i}") for i in (3, 9)
    ]
    Ledger(tmp_path / "run", 0).write(4, entries)
    Ledger(tmp_path / "run", 1).write(11, entries[:1])
    (root / "documents.jsonl").write_text(
        json.dumps({"shard": "d.tar", "key": "x[1]", "offset": 0, "size": 9, "reason": "empty text"}) + "\n"
    )
    copy_index_damage(tmp_path / "run", {"documents": root / "documents.jsonl"})
    return tmp_path / "run"


def test_the_ledger_is_shown_by_source_and_reason_with_examples(ended_run, xc_data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert xc_data("ledger", ended_run) == 0
    lines = capsys.readouterr().out.splitlines()
    (text,) = [line for line in lines if line.lstrip().startswith("text ")]
    assert text.split()[:8] == ["text", "while", "training", "2", "3", "5", "to", "12"]
    assert "bytes changed" in text
    assert "train-000000.tar" in text
    (documents,) = [line for line in lines if line.lstrip().startswith("documents")]
    assert "when indexed" in documents
    assert "d.tar x[1]" in documents


def test_the_ledger_becomes_a_selection_without_the_dropped_samples(ended_run, xc_data, tmp_path, capsys):
    before = {p: p.read_bytes() for p in ended_run.rglob("*") if p.is_file()}
    assert xc_data("ledger", ended_run, "--source", "text", "-o", tmp_path / "healthy") == 0
    assert "left out: 2 by ledger" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in ended_run.rglob("*") if p.is_file()} == before
    root = tmp_path / "demo"
    sources = {"text": SourceConfig(str(root / "text"), selection=str(tmp_path / "healthy"))}
    (source,) = open_data(data_config(root, sources=sources), SEED).sources
    whole = open_data(data_config(root, sources={"text": SourceConfig(str(root / "text"))}), SEED).sources[0]
    dropped = set(range(whole.facts.kept)) - set(source.kept(0, int(source.block_starts[-1])).tolist())
    assert {whole.key(row) for row in dropped} == {e["key"] for e in read_ledger(ended_run) if e["source"] == "text"}
    assert len(dropped) == 2
    # once more, on top of the selection that the run used
    config = yaml.safe_load((ended_run / "config.yaml").read_text())
    config["data"]["sources"]["text"]["selection"] = str(tmp_path / "healthy")
    (ended_run / "config.yaml").write_text(yaml.safe_dump(config))
    row = read_index(sidecar_path(root / "text" / "train-000000.tar", root / "text")).table.to_pylist()[0]
    entry = BadEntry("text", "train-000000.tar", row["key"], row["offset"], row["size"], "again")
    Ledger(ended_run, 0).write(20, [entry, replace(entry, source="pairs")])
    assert xc_data("ledger", ended_run, "--source", "text", "-o", tmp_path / "healthier") == 0
    out = capsys.readouterr().out
    assert "left out: 2 by selection before" in out
    assert "left out: 1 by ledger" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "text"], "go together"),
        (["--source", "nothing", "-o", "{new}"], "give one of documents, pairs, text"),
        (["--source", "pairs", "-o", "{new}"], "dropped nothing of pairs"),
        (["--source", "text", "-o", "{run}"], "exists"),
    ],
)
def test_a_mistake_is_one_line(ended_run, xc_data, tmp_path, capsys, arguments, says):
    given = [a.format(new=tmp_path / "new", run=ended_run) for a in arguments]
    assert xc_data("ledger", ended_run, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_run_is_a_mistake(tmp_path, xc_data, capsys):
    assert xc_data("ledger", tmp_path) == 2
    assert "no run directory" in capsys.readouterr().err

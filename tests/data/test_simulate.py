"""What `xc-data simulate` foretells from the index is what the loader then does; its shuffle measures are what they say."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from demo_data import COSTS, SEED, START
from hypothesis import given
from hypothesis import strategies as st
from stage_yaml import write_stage

from data_pipeline.configure import load_data_view
from data_pipeline.inspect.shuffle import neighbour_distance, one_shard
from data_pipeline.inspect.simulate import simulate
from data_pipeline.loader import Loader
from data_pipeline.opened import open_data
from data_pipeline.plan.balance import cost

COST = f"{COSTS.token},{COSTS.attention},{COSTS.image}"


@pytest.mark.parametrize(("world", "micro_packs"), [(3, 1), (2, 2)])
def test_every_figure_of_a_step_is_that_of_the_batches_that_the_ranks_get(demo, tmp_path, world, micro_packs):
    config = write_stage(tmp_path / "c.yaml", demo, micro_packs=micro_packs, workers=0, window=500)
    found = simulate(config, [], world, None, COST)
    section = load_data_view(config).data
    data = open_data(section, SEED)
    ranks = [list(Loader(section, data, SEED, COSTS, rank, world, START, 0)) for rank in range(world)]
    assert (len(found.steps), found.run_steps, found.ended) == (len(ranks[0]), len(ranks[0]), True)
    drawn = np.zeros(len(data.sources))
    for step, parts in zip(found.steps, zip(*ranks, strict=True), strict=True):
        batches = [[m.batch for m in part.micro_batches] for part in parts]
        flat = [batch for of_rank in batches for batch in of_rank]
        packs = [pack for part in parts for m in part.micro_batches for pack in m.request.packs]
        tokens = sum(sum(b.segment_lengths[:-1]) for b in flat)
        assert (step.packs, step.tokens) == (len(packs), tokens)
        assert step.fill == pytest.approx(tokens / (len(packs) * section.context))
        assert step.padding_free == pytest.approx(tokens / sum(len(b.input_ids) for b in flat))
        assert step.empty == pytest.approx(1 - len(packs) / (len(flat) * micro_packs))
        images = [sum(len(b.image_index) for b in of_rank if b.image_count) for of_rank in batches]
        assert step.image_tokens == (pytest.approx(sum(images) / world), max(images))
        costs = np.array([[sum(pack_cost(p) for p in m.request.packs) for m in part.micro_batches] for part in parts])
        assert step.cost == pytest.approx(costs.sum(1).max() / costs.sum(1).mean())
        assert step.lock_step == pytest.approx(costs.max(0).sum() / costs.sum(1).mean())
        drawn += step.samples
        assert step.bytes == sum(
            data.sources[s].locate(r).size for p in packs for s, r in zip(p.source.tolist(), p.row.tolist(), strict=True)
        )
        shards = {(s, data.sources[s].locate(r).shard) for p in packs for s, r in zip(p.source.tolist(), p.row.tolist(), strict=True)}
        assert step.shards == len(shards)
    assert drawn.tolist() == [source.facts.kept for source in data.sources], "one epoch"


def pack_cost(pieces) -> int:
    return int(cost(pieces.tokens, pieces.images, np.array([0, len(pieces)]), COSTS)[0])


def test_no_shard_is_opened(demo, tmp_path, xc_data, capsys):
    sources = {name: {"path": str(demo.copy(name, tmp_path / name))} for name in ("pairs", "documents")}
    for shard in tmp_path.glob("*/*.tar"):
        shard.unlink()
    config = write_stage(tmp_path / "c.yaml", demo, sources=sources)
    assert xc_data("simulate", config, "--world", 2, "-o", tmp_path / "page.html") == 0
    assert "c.yaml:" in capsys.readouterr().out
    assert (tmp_path / "page.html").exists()


def test_a_batch_that_does_not_divide_is_told_and_one_that_does_is_not(demo, tmp_path, xc_data, capsys):
    config = write_stage(tmp_path / "c.yaml", demo, window=1000)
    assert xc_data("simulate", config, "--world", 3, "--steps", 5) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "8 packs do not divide over 3 ranks x 1: 11.1% of all packs are empty (use 6 or 9)" in told
    assert xc_data("simulate", config, "--world", 4, "--steps", 5) == 0
    assert "warning" not in capsys.readouterr().out


def test_the_length_of_a_run_is_walked_estimated_or_given(demo, tmp_path):
    config = write_stage(tmp_path / "c.yaml", demo, window=500)
    whole = simulate(config, [], 2, None, None)
    part = simulate(config, [], 2, len(whole.steps) // 2, None)
    assert whole.ended
    assert not part.ended
    assert part.run_steps == pytest.approx(whole.run_steps, rel=0.1)
    given_length = simulate(config, ["data.unit=samples", "train.steps=40"], 2, 10, None)
    assert (given_length.run_steps, len(given_length.steps), given_length.ended) == (40, 10, False)
    assert len(simulate(config, ["data.unit=samples", "train.steps=7"], 2, None, None).steps) == 7
    assert len(simulate(config, ["train.steps=7", "train.steps=null"], 2, None, None).steps) == len(whole.steps)
    endless = simulate(config, ["data.unit=samples"], 2, 3, None)
    assert (endless.run_steps, endless.ended) == (None, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world", 0), "nothing to simulate"),
        (("--world", 2, "--steps", 0), "nothing to simulate"),
        (("--world", 2, "--cost", "1,2"), "--cost '1,2' is not TOKEN,ATTENTION,IMAGE"),
        (("--world", 2, "--cost", "1,2,x"), r"RUN/lives\.jsonl"),
        (("--world", 2, "-o", "/nowhere/page.html"), "cannot write"),
        (("--world", 2, "data.contxt=3"), "did you mean context"),
    ],
)
def test_a_mistake_is_one_line(demo, tmp_path, xc_data, capsys, arguments, message):
    config = write_stage(tmp_path / "c.yaml", demo)
    assert xc_data("simulate", config, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_no_packs_at_once_are_the_users_mistake(demo, tmp_path, xc_data, capsys):
    assert xc_data("simulate", write_stage(tmp_path / "c.yaml", demo), "--world", 2, "data.micro_packs=0") == 2
    assert capsys.readouterr().err == "error: data.micro_packs is 0 (give at least 1)\n"


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3))
def test_pairs_from_one_shard_are_counted_as_one_by_one(shards: list[list[int]]) -> None:
    found = one_shard([np.array(s, np.int64) for s in shards])
    pairs = [a == b for s in shards for i, a in enumerate(s) for b in s[:i]]
    samples = sum(map(len, shards))
    assert found.pairs == pytest.approx(sum(pairs) / max(1, len(pairs)))
    assert found.largest == pytest.approx(max(s.count(v) for s in shards for v in range(4)) / max(1, samples))


@given(st.permutations(range(20)), st.integers(1, 5), st.integers(1, 3))
def test_neighbour_distance_is_that_of_each_pair_on_disk(order: list[int], a_step: int, epochs: int) -> None:
    rows = np.array(order * epochs)
    epoch = np.repeat(np.arange(epochs), len(order))
    steps = np.arange(len(rows)) // a_step
    at = [{row: int(steps[e * 20 + i]) for i, row in enumerate(order)} for e in range(epochs)]
    expected = [abs(at[e][b] - at[e][a]) for e in range(epochs) for a, b in pairwise(range(20))]
    mean, count = neighbour_distance(rows, epoch, steps)
    assert count == len(expected)
    assert mean == pytest.approx(sum(expected) / count)


def test_shuffle_measures_tell_an_unshuffled_order_from_a_uniform_one():
    rows, steps = np.arange(10_000), np.arange(10_000) // 100
    shuffled = np.random.default_rng(0).permutation(rows)
    zero = np.zeros(10_000, np.int64)
    assert neighbour_distance(rows, zero, steps)[0] < 0.02
    assert neighbour_distance(shuffled, zero, steps)[0] == pytest.approx(100 / 3, rel=0.05)
    assert one_shard([rows[:100] // 1000]).pairs == 1.0
    assert one_shard([shuffled[:1000] // 1000]).pairs == pytest.approx(0.1, abs=0.01)


def test_the_page_is_whole_and_loads_nothing(demo, tmp_path, xc_data):
    config = write_stage(tmp_path / "c<b>.yaml", demo)
    page: Path = tmp_path / "page.html"
    assert xc_data("simulate", config, "--world", 3, "-o", page) == 0
    text = page.read_text()
    assert not re.search(r"https?://|\bsrc=|href=|@import|url\(", text)
    assert "c&lt;b&gt;.yaml" in text
    assert text.count("<svg") == 8
    assert not list(tmp_path.glob(".page.html.*"))

"""`xc-data replay` builds what the loader handed to each rank of a real run, tensor for tensor, and refuses what it cannot know."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from chromium import browser
from demo_data import same_batch
from tars import overwrite

from data_pipeline import jsonl
from data_pipeline.config import ImageConfig
from data_pipeline.errors import EXIT_DONE, UserError
from data_pipeline.inspect.replay import Step, open_step
from data_pipeline.loader import Loader, StepData
from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.killers import Killers
from data_pipeline.read.materialise import Materialiser
from train import checkpoint, configure
from train.config import Config
from train.flops import cost_model
from train.run_dir import RunDir

WORLD = 2
STEPS = 7
START = Cursor(0, 0)


@pytest.fixture(scope="module")
def run(demo, environment, tmp_path_factory) -> RunDir:
    """Two ranks, four micro-steps of two packs in which 13 packs leave empty ones; two lives; windows end within steps; one bad sample."""
    import yaml
    from stages import Stage, stage_settings

    folder = tmp_path_factory.mktemp("replay")
    pairs = demo.copy("pairs", folder / "pairs")
    settings = stage_settings(demo, folder / "run")
    settings["data"] |= {"global_batch": 13, "micro_packs": 2, "window": 300}
    settings["data"]["sources"]["pairs"]["path"] = str(pairs)
    settings["train"]["steps"] = 5
    settings["checkpoint"]["every"] = 3
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    stage = Stage(config, RunDir(folder / "run"), environment)
    loaded = configure.load(config)
    data = open_data(loaded.data, loaded.run.seed)
    number = [source.name for source in data.sources].index("pairs")
    victim = next(int(p.row[p.source == number][0]) for p in data.plan.global_batch(START).packs if number in p.source)
    at = data.sources[number].locate(victim)
    assert at.shard.is_relative_to(folder)
    overwrite(at.shard, at.offset + 600, b"\xff")
    assert stage.train(procs=WORLD).returncode == EXIT_DONE
    return stage.run


def loaded_steps(config: Config) -> list[list[StepData]]:
    """What the loader hands to each rank, step by step."""
    data = open_data(config.data, config.run.seed)
    costs = cost_model(config)
    loaders = [iter(Loader(config.data, data, config.run.seed, costs, rank, WORLD, START, 0)) for rank in range(WORLD)]
    return [[next(loader) for loader in loaders] for _ in range(STEPS)]


@pytest.fixture(scope="module")
def handed(run) -> list[list[StepData]]:
    return loaded_steps(configure.read_resolved(run.path))


def copy_of(run: RunDir, to: Path) -> RunDir:
    """The run's notes, without its weights, for a test to damage."""
    for name in ("config.yaml", "metrics.jsonl", "lives.jsonl"):
        to.mkdir(exist_ok=True)
        shutil.copy(run.path / name, to)
    for state in run.path.glob("checkpoints/step-*/state.json"):
        (to / state.relative_to(run.path)).parent.mkdir(parents=True)
        shutil.copy(state, to / state.relative_to(run.path))
    return RunDir(to)


def assert_same(step: Step, expected: list[StepData]) -> None:
    built = list(step.build(range(WORLD)))
    wanted = [(m, rank) for rank, of_rank in enumerate(expected) for m in of_rank.micro_batches]
    assert len(built) == len(wanted)
    for (micro, batch), (micro_batch, rank) in zip(built, wanted, strict=True):
        assert (micro.rank, micro.micro) == (rank, micro_batch.request.micro)
        assert same_batch(batch, micro_batch.batch)
        reasons = [card.dropped for pack in micro.packs for card in pack.cards if card.dropped]
        assert reasons == [bad.reason for bad in micro_batch.bad]


@pytest.mark.parametrize("number", range(1, 6))
def test_replay_builds_what_the_loader_handed_to_each_rank_tensor_for_tensor(run, handed, number):
    step = open_step(run.path, number)
    assert step.record.known_step == number, "the trainer notes where each step begins"
    assert_same(step, handed[number - 1])


def test_replayed_targets_are_those_that_the_losses_were_over(run):
    for line in jsonl.read(run.metrics):
        step = open_step(run.path, line["step"])
        found = Counter()
        for micro, _ in step.build(range(WORLD), pictures=False):
            for card in (card for pack in micro.packs for card in pack.cards):
                found[step.data.sources[card.source].name] += card.supervised
        assert found == {n.partition("/")[2]: count for n, count in line.items() if n.startswith("tokens_by_source/")}


def test_a_step_that_was_never_noted_is_walked_to_from_the_nearest_checkpoint(run, handed, tmp_path):
    made = copy_of(run, tmp_path / "run")
    lines = jsonl.read(made.metrics)
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= 2))
    for number, known in ((2, 2), (3, 2), (4, 4), (5, 4), (6, 6), (7, 6)):
        step = open_step(made.path, number)
        assert step.record.known_step == known
        assert_same(step, handed[number - 1])


def test_no_cursor_of_another_plan_is_taken(run, handed, tmp_path):
    made = copy_of(run, tmp_path / "run")
    (start,) = [event for event in jsonl.read(made.lives) if event["event"] == "start"]
    jsonl.append(made.lives, [{**start, "life": 2, "resumed_from": 2, "plan": "another"}, {**start, "life": 3, "resumed_from": 2}])
    lines = jsonl.read(made.metrics)[:3]
    lines[2] |= {"life": 2, "data/pack": 1}
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for state in made.checkpoints.glob("*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "plan_digest": "another", "cursor": [0, 1]}))
    step = open_step(made.path, 4)
    assert (step.record.life, step.record.known_step) == (3, 2)
    assert_same(step, handed[3])


@pytest.mark.parametrize("repeat", [True, False])
def test_a_step_after_a_change_of_plan_is_found_from_where_the_new_plan_took_over(run, tmp_path, repeat):
    made = copy_of(run, tmp_path / "run")
    made.config.write_text(made.config.read_text().replace("weight: '1'", "weight: '2'", 1))
    state = checkpoint.read_state(made.checkpoints / "step-00000003")
    origin = state.drawn.origin(state.next_cursor, state.step, repeat)
    config = configure.read_resolved(made.path)
    data = open_data(config.data, config.run.seed, config.train.steps, origin)
    (start,) = [event for event in jsonl.read(made.lives) if event["event"] == "start"]
    jsonl.append(made.lives, [{**start, "life": 2, "resumed_from": 3, "plan": data.plan.digest, "origin": asdict(origin)}])
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in jsonl.read(made.metrics) if line["step"] <= 3))
    cursor, costs = Cursor(origin.window, 0), cost_model(config)
    ranks = [iter(Loader(config.data, data, config.run.seed, costs, rank, WORLD, cursor, 3)) for rank in range(WORLD)]
    for number in (4, 5, 6):
        step = open_step(made.path, number)
        assert (step.record.life, step.record.known_step) == (2, 4)
        assert_same(step, [next(rank) for rank in ranks])


def test_what_was_dropped_and_which_packs_were_empty_is_in_the_table(run, xc_data, capsys, tmp_path):
    assert xc_data("replay", run.path, "--step", 1, "-o", tmp_path / "page.html") == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    (dropped,) = [line for line in printed.out.splitlines() if "bytes changed since they were indexed" in line]
    assert "train-00000" in dropped
    assert "dropped: bytes changed since they were indexed" in (tmp_path / "page.html").read_text()
    rows = [line.split() for line in printed.out.splitlines()]
    full = {(int(r[0]), int(r[1])) for r in rows if len(r) > 10 and r[0].isdecimal()}
    empty = {(int(r[0]), int(r[1])) for r in rows if r[-2:] == ["empty", "pack"]}
    built = {(micro.rank, micro.micro): micro.packs for micro, _ in open_step(run.path, 1).build(range(WORLD), pictures=False)}
    assert len(built) == WORLD * 4
    assert full == {place for place, packs in built.items() if packs} and empty == built.keys() - full and empty
    for rank in range(WORLD):
        assert xc_data("replay", run.path, "--step", 1, "--rank", rank) == 0
        of_rank = capsys.readouterr().out
        assert ("bytes changed" in of_rank) == (dropped.split()[0] == str(rank))
        assert {r[0] for line in of_rank.splitlines() if len(r := line.split()) > 10 and r[0].isdecimal()} == {str(rank)}


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_of_a_step_in_a_browser_loads_nothing_decodes_its_pictures_and_finds_a_rank(run, xc_data, tmp_path, width):
    page = tmp_path / "page.html"
    assert xc_data("replay", run.path, "--step", 2, "-o", page) == 0
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, width)
        sizes = chromium.run("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth))))")
        assert len(sizes) > 3
        assert set(sizes) == {32}
        assert chromium.requests == [page.as_uri()]
        assert chromium.errors == []
        assert chromium.run("document.documentElement.scrollWidth") == width
        chromium.type_into("#find", '"rank 1, micro-step 0"')
        shown = chromium.run("[...document.querySelectorAll('.pack:not([hidden]) h2 + .facts')].map(f => f.textContent)")
        assert set(shown) == {"rank 1, micro-step 0"}


def test_shards_that_changed_after_the_step_are_told_by_the_runs_own_counts(run, xc_data, capsys, tmp_path):
    made = copy_of(run, tmp_path / "run")
    lines = jsonl.read(made.metrics)
    lines[0]["tokens_by_source/text"] += 3
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert xc_data("replay", made.path, "--step", 1) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: text: the run trained on")
    assert warning.endswith("(its shards changed since)")


def test_a_sample_that_was_listed_as_a_killer_after_the_step_is_told_as_that(run, xc_data, capsys, tmp_path):
    made = copy_of(run, tmp_path / "run")
    data = open_step(made.path, 1).data
    number = [source.name for source in data.sources].index("text")
    row = next(int(p.row[p.source == number][0]) for p in data.plan.global_batch(START).packs if number in p.source)
    Killers(made.path, 0, ()).add([Materialiser(data.sources, data.tokenizer, ImageConfig(), 0).entry(number, row, "killed a worker")])
    assert xc_data("replay", made.path, "--step", 1) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: text: the run trained on")
    assert warning.endswith(f"(samples listed in {made.path}/killers are left out of this view)")


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--step", 0), "the first step is 1"), (("--step", 1, "--rank", 2), "had ranks 0 to 1")]
)
def test_a_step_or_rank_that_is_not_there_is_a_mistake(run, xc_data, capsys, arguments, message):
    assert xc_data("replay", run.path, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_step_past_the_end_of_the_run_is_a_mistake_that_names_the_last(run, tmp_path):
    made = copy_of(run, tmp_path / "run")
    made.config.write_text(made.config.read_text().replace("unit: samples", "unit: epochs").replace("steps: 5", "steps: null"))
    config = configure.read_resolved(made.path)
    plan = open_data(config.data, config.run.seed).plan
    made.lives.write_text(made.lives.read_text().replace(jsonl.read(made.lives)[0]["plan"], plan.digest))
    made.metrics.unlink()
    shutil.rmtree(made.checkpoints)
    cursor, steps = START, 0
    while (batch := plan.global_batch(cursor)).packs:
        cursor, steps = batch.cursor, steps + 1
    assert open_step(made.path, steps).record.known_step == 1
    with pytest.raises(UserError, match=f"the run ends after step {steps} "):
        open_step(made.path, steps + 1)


def test_data_that_was_indexed_anew_is_refused(run, tmp_path):
    made = copy_of(run, tmp_path / "run")
    made.config.write_text(made.config.read_text().replace("seed: 7", "seed: 8"))
    with pytest.raises(UserError, match="its data was indexed anew or selected otherwise"):
        open_step(made.path, 1)


def test_a_run_that_notes_no_costs_is_refused_with_the_cure(run, tmp_path):
    made = copy_of(run, tmp_path / "run")
    made.lives.unlink()
    with pytest.raises(UserError, match=r"no life notes the plan and the costs of step 1 .*xc-data preview"):
        open_step(made.path, 1)
    with pytest.raises(UserError, match="is no run directory"):
        open_step(tmp_path, 1)

"""The small model's documents say what its run directories say."""

import importlib
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from train import configure
from train.evaluate import Scorer
from train.weights.opened import open_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "small"))
    import ablation

    monkeypatch.setattr(ablation, "CONFIGS", EXAMPLES.parent / "configs" / "small" / "ablation")
    monkeypatch.chdir(tmp_path)


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def lived(run: Path, seconds: int) -> None:
    events = [{"event": "start", "life": 1, "time": 0}, {"event": "end", "life": 1, "time": seconds}]
    (run / "lives.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def held_out(seed: int) -> dict:
    """What a stage reaches on the test half."""
    from results import FIGURES

    split = dict.fromkeys(FIGURES, 0.5 + seed / 100) | {"nll_blind": 4.0}
    sample = {"key": "k|1", "reference": "a saw", "generated": "a saw\n", "generated_right": True, "retrieved": "a bull"}
    return split | {"stderr": dict.fromkeys(split, 0.02), "samples": [sample | {"retrieved_right": False}]}


def write_seed(seed: int) -> None:
    """Figures that tell seeds apart, where results.py finds them."""
    from records import HELD_OUT
    from results import ALIKE, RUNS, measured, record_of

    item = {"caption": "tool: saw", "candidates": ["tool: saw", "animal: bull", "tool: axe", "plant: oak"]}
    for half in (HELD_OUT / "test", ALIKE):
        write(half / "candidates.json", {"items": [item, {**item, "caption": "plant: oak"}]})
    evaluation = {"dtype": "torch.bfloat16", "plora_b_norm": 50.0 + seed, "splits": {"test": held_out(seed)}}
    write(RUNS / str(seed) / "pretrain" / "evaluation.json", evaluation)
    lived(RUNS / str(seed) / "pretrain", 600)
    write(RUNS / str(seed) / "pretrain" / "text.json", {"tables": [{"notes": ["Logits are the same."]}]})
    write(RUNS / str(seed) / "pretrain" / "paired.json", [3.5 - seed / 100, 0.05])
    rows = [{"figure": f, "value": 0.3, "stderr": 0.02} for f in ("retrieval_of_10", "picture_of_10")]
    write(RUNS / str(seed) / "pretrain" / "alike.json", {"tables": [{"rows": rows}]})
    write(record_of(seed), {"processor": "a processor", **measured(seed)})


def write_controls() -> None:
    """Of which validation prefers the first rate and two passes."""
    import control

    for rate, nats in zip(control.RATES, ((3.5, 3.0, 3.1), (4.0, 4.5)), strict=True):
        for passes, value in zip(control.DOUBLED, nats, strict=False):
            found = {"validation": [value, 0.1], "test": [value + 1, 0.1], "minutes": 8.0}
            write(control.record_of((rate, passes), 0), found)
    write(control.record_of(control.best(), 1), {"validation": [9.0, 0.1], "test": [4.0, 0.1], "minutes": 8.0})


def check(monkeypatch, program, document: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["program", "0", "1", "--check", str(document)])
    return program.main()


def test_the_check_of_results_fails_where_the_document_says_something_else(monkeypatch, tmp_path, capsys):
    import control
    import records
    import results

    write_controls()
    for seed in (0, 1):
        write_seed(seed)
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\n{results.figures([0, 1])}\n\n{records.sample_table(results.recorded(0)['samples'])}\n")
    assert check(monkeypatch, results, document) == 0
    said = document.read_text()
    seeds = "| 0.500 ± 0.020 | 0.510 ± 0.020 | **0.505** ± 0.007"
    assert f"| caption of its picture, among ten {seeds} | at least 0.5: held |" in said
    assert f"| picture of its caption, among ten {seeds} | at least 0.6: missed |" in said
    assert f"| nats a token of a caption, behind its picture {seeds} | at most 4.000: held |" in said
    assert "| minutes of training | 10.000 | 10.000 | **10.000** ± 0.000 | at most 60.000: held |" in said
    assert "| caption among ten that are alike | 0.300 ± 0.020 | 0.300 ± 0.020 | **0.300** ± 0.000 |  |" in said
    assert "by guessing among those of the right category | 0.750 | 0.750 | **0.750** ± 0.000 |" in said
    assert "| k/1 | a saw | **a saw** | a bull |" in said
    assert "| norm of B, which is 0 at the start | 50.000 | 51.000 |" in said
    assert f"| {results.CONTROL} | 4.000 ± 0.100 | 4.000 ± 0.100 |" in said
    assert f"| {results.LESS} | 3.500 ± 0.050 | 3.490 ± 0.050 |" in said
    assert "| number format | bfloat16 | bfloat16 | | |" in said
    assert "| trained on | a processor | a processor | | |" in said
    document.write_text(said.replace("0.510", "0.610"))
    assert check(monkeypatch, results, document) == 1
    assert "does not hold the table that begins | | seed 0" in capsys.readouterr().err
    document.write_text(said.replace("| trained on", "| of an older run | 1 | 2 | **1.5** | |\n| trained on"))
    assert check(monkeypatch, results, document) == 1, "a line that the table does not have"
    document.write_text(said + "| k/2 | an older | row | there |\n")
    assert check(monkeypatch, results, document) == 1, "a line behind it"
    document.write_text(said)
    lived(results.RUNS / "1" / "pretrain", 660)
    with pytest.raises(UserError, match=r"seed-1.json does not say what runs/small/seeds/1 says"):
        check(monkeypatch, results, document)
    shutil.rmtree(results.RUNS)
    assert check(monkeypatch, results, document) == 0, "a record is enough"
    chosen = control.record_of(control.best(), 1)
    found = json.loads(chosen.read_text())
    write(chosen, found | {"test": [4.1, 0.1]})
    with pytest.raises(
        UserError, match=r"difference of seed 1 is to another control .*delete .*seed-1.json and .*paired.json, and run results.py 1"
    ):
        check(monkeypatch, results, document)
    write(chosen, found)
    results.record_of(1).write_text("{")
    with pytest.raises(UserError, match=r"seed-1.json is no JSON \(take it from git"):
        check(monkeypatch, results, document)


def test_the_check_of_stages_fails_where_the_document_or_a_run_says_something_else(monkeypatch, tmp_path):
    import records
    import three_stages as stages

    for stage in stages.STAGES:
        write(stages.RUNS / stage / "evaluation.json", {"splits": {"test": held_out(0)}})
        lived(stages.RUNS / stage, 1200)
    for stage, suite in stages.SUITES:
        rows = [{"figure": f, "value": 0.4, "stderr": 0.1, "beside": 0.25, "count": 36} for of, f in stages.ROWS if of == suite]
        write(stages.tables_of(stage, suite), {"tables": [{"rows": rows}]})
    steps = [{"step": "write", "fallback": None}, {"step": "choose lines", "fallback": "not marks"}, {"step": "retrieve", "fallback": "no"}]
    for number in range(stages.ARTICLES):
        text = {"title": f"T {number}", "lines": ["One.", "Two."], "pictures": [{"caption": "C"}]}
        write(
            stages.article_of(number).with_suffix(".json"),
            {"instruction": "Explain: T", "made_with": {"seed": 0}, "article": text, "steps": steps},
        )
        stages.article_of(number).touch()
    record = {"processor": "a processor", **stages.measured()}
    write(stages.RECORD, record)
    tables = (stages.figures(record), records.sample_table(record["samples"]), stages.articles(record))
    said = "\n\n".join(tables)
    assert "| figure of a caption, among four |  | 0.400 ± 0.100 | 0.400 ± 0.100 | 0.250 |" in said
    assert "| minutes of training, a processor | 20.0 | 20.0 | 20.0 | |" in said
    assert "| Explain: T | T 0 | One. | C | 1 of 2 |" in said

    def checked(text: str) -> int:
        (tmp_path / "results.md").write_text(text)
        monkeypatch.setattr(sys, "argv", ["three_stages.py", "--check", str(tmp_path / "results.md")])
        return stages.main()

    assert checked(said) == 0
    assert checked(said.replace("0.400", "0.500")) == 1
    lived(stages.RUNS / "sft", 1260)
    with pytest.raises(UserError, match="does not say what"):
        checked(said)


def test_the_documents_that_are_committed_say_what_the_committed_records_say(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    seeds = sorted(file.stem.removeprefix("seed-") for file in Path("docs/results").glob("seed-*.json"))
    pages = dict.fromkeys(("three_stages", "control", "results"), "docs/results.md") | {"ablation": "docs/plora_ablation.md"}
    for program, page in pages.items():
        of = seeds if program != "three_stages" else []
        monkeypatch.setattr(sys, "argv", [program, *of, "--check", page])
        assert importlib.import_module(program).main() == 0


def test_the_control_is_trained_as_validation_prefers_and_its_config_is_that(monkeypatch, tmp_path):
    import control

    write_controls()
    assert control.best() == ("1e-4", 2)
    assert control.table().endswith("| 1e-4 | 1: 3.500 · **2: 3.000** · 4: 3.100 |\n| 3e-4 | 1: 4.000 · 2: 4.500 |"), (
        "no more than is worse"
    )
    document = tmp_path / "results.md"
    document.write_text(control.table())
    run = control.run_of(control.best(), 1)
    split = {"nll_blind": 9.0, "stderr": {"nll_blind": 0.1}}
    write(run.evaluation, {"splits": {"validation": split, "test": split | {"nll_blind": 4.0}}})
    lived(run.path, 480)
    assert check(monkeypatch, control, document) == 0
    for seconds, nats in ((540, 4.0), (480, 4.1)):
        lived(run.path, seconds)
        write(run.evaluation, {"splits": {"validation": split, "test": split | {"nll_blind": nats}}})
        with pytest.raises(UserError, match=r"control/1/1e-4-2.json does not say what runs/small/control/1/1e-4-2 says"):
            check(monkeypatch, control, document)
    monkeypatch.chdir(EXAMPLES.parent)
    config, (rate, passes) = configure.load(control.CONFIG), control.best()
    assert (config.train.lr, float(config.data.sources["captions"].weight)) == (float(rate), passes)


def write_record(arm: str, rate: str, seed: int, **found: object) -> None:
    """More of what a run of the ablation reached."""
    import ablation

    write(ablation.record_of(arm, rate, seed), {"rates": ablation.rates_of(arm, rate), **ablation.recorded(arm, rate, seed), **found})


def test_an_arm_of_the_ablation_takes_the_rate_that_validation_prefers(monkeypatch, tmp_path):
    import ablation

    write_controls()
    for arm, rates in ablation.RATES.items():
        for number, rate in enumerate(rates):
            write_record(arm, rate, 0, validation=4.0 + abs(number - (0 if arm == "lora" else 1)))
        for seed in (0, 1):
            test = {figure: [0.5 + seed, 0.25] for figure in ablation.COLUMNS} | {"less": [3.5 - seed, 0.25]}
            write_record(arm, ablation.best_rate(arm), seed, minutes=10.0, test=test)
    chosen = {arm: rates[0 if arm == "lora" else 1] for arm, rates in ablation.RATES.items()}
    assert {arm: ablation.best_rate(arm) for arm in ablation.RATES} == chosen
    assert "| lora | **1e-4: 4.000** · 3e-4: 5.000 · 1e-3: 6.000 · 3e-3: 7.000 | at an end |" in ablation.tuning_table()
    document = tmp_path / "ablation.md"
    document.write_text(f"{ablation.tuning_table()}\n\n{ablation.outcome_table([0, 1])}")
    assert check(monkeypatch, ablation, document) == 0
    said = document.read_text()
    assert "| plora | 3e-4: 5.000 · **1e-3: 4.000** · 3e-3: 5.000 · 1e-2: 6.000 |  |" in said
    assert "| no picture | 4.000 ± 0.000 (0.100) | | | | | | |" in said
    others = "| 1.000 ± 0.707 (0.250) "
    assert f"| plora {others}| 3.000 ± 0.707 (0.250) {others * 4}| 10 |" in said
    document.write_text(said.replace("0.707", "0.0"))
    assert check(monkeypatch, ablation, document) == 1
    document.write_text(said)
    run = ablation.run_of("plora", "1e-3", 1)

    def ran(seconds: int, nats: float) -> None:
        write(ablation.captions_of(run), {"tables": [{"rows": [{"figure": "nll_right", "value": nats, "stderr": 0.25}]}]})
        lived(run.path, seconds)

    ran(600, 1.5)
    assert check(monkeypatch, ablation, document) == 0
    for seconds, nats in ((660, 1.5), (600, 1.6)):
        ran(seconds, nats)
        with pytest.raises(UserError, match=r"1/plora-1e-3.json does not say what runs/small/ablation/1/plora-1e-3 says"):
            check(monkeypatch, ablation, document)
    shutil.rmtree(run.path)
    write_record("plora", "1e-3", 1, test=test | {"less": [2.4, 0.25]})
    with pytest.raises(UserError, match=r"difference of seed 1 is to another control .*1/plora-1e-3.json, and run ablation.py 1"):
        check(monkeypatch, ablation, document)
    monkeypatch.setitem(ablation.RATES, "projector", ("2e-3",))
    for seed in (0, 1):
        test = {figure: [0.5, 0.25] for figure in ablation.COLUMNS} | {"less": [3.5, 0.25]}
        write_record("projector", "2e-3", seed, validation=1.0, minutes=10.0, test=test)
    with pytest.raises(FileNotFoundError):  # PLoRA was trained beside a projector of another rate
        check(monkeypatch, ablation, document)


def test_the_ablation_asks_for_the_control_before_it_trains(monkeypatch):
    import ablation

    monkeypatch.setattr(ablation, "side_by_side", lambda *tasks: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["ablation.py", "0"])
    with pytest.raises(UserError, match=r"the control was not tuned: no .*1e-4-1.json \(run control.py 0\)"):
        ablation.main()
    write_controls()
    with pytest.raises(UserError, match="no control in runs/small/control/0/1e-4-2"):
        ablation.main()


def test_words_alone_leave_out_the_begin_and_the_end_that_captions_teach(run_dir, demo, monkeypatch):
    import ablation

    monkeypatch.setattr(ablation, "HELD_OUT", demo.source("heldout"))
    opened = open_model(run_dir)
    scorer = Scorer(opened.model, opened.tokenizer, opened.config)
    texts = scorer.texts(demo.source("heldout/text"))
    everything, words = scorer.score(texts), ablation.words_alone(opened)
    for segment in texts:
        segment.rendered.supervised[2:-1] = False
    assert (words.tokens == everything.tokens - 2).all()
    assert words.nll == pytest.approx(everything.nll - scorer.score(texts).nll, rel=1e-4)


def test_where_one_of_two_tasks_fails_no_other_is_begun():
    from ablation import side_by_side

    begun, failed = [], threading.Event()

    def work(arm: str, number: int) -> None:
        begun.append(number)
        if arm == "fails":
            failed.set()
            raise SystemExit(3)
        if arm == "waits":
            failed.wait(60)
            time.sleep(0.5)  # until that is known

    side_by_side(work, [("ends", number) for number in range(5)], 2)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    begun.clear()
    with pytest.raises(SystemExit, match="3"):
        side_by_side(work, [("waits", 0), ("fails", 1), ("ends", 2)], 2)
    assert sorted(begun) == [0, 1]


def test_beside_another_part_the_projector_keeps_the_rate_that_it_prefers_alone(monkeypatch):
    import ablation

    for arm, rates in ablation.RATES.items():
        for number, rate in enumerate(rates):
            write_record(arm, rate, 0, validation=4.0 - number)
    rates = {}
    for arm, (first, *_) in ablation.RATES.items():
        config = ablation.config_of(arm, first, 1)
        assert config.run.seed == 1
        rates[arm] = [config.train.lr * group.lr_scale for group in config.train.groups if group.trainable]
    assert rates == {
        "projector": [pytest.approx(1e-3)],
        "plora": pytest.approx([3e-2, 3e-4]),
        "lora": pytest.approx([3e-2, 1e-4]),
        "full": pytest.approx([3e-2, 3e-5]),
    }


def test_a_training_measures_the_pairs_that_it_is_told_and_nothing_else(monkeypatch, tmp_path):
    import records
    import results

    asked = []
    monkeypatch.setattr("control.RUNS", tmp_path / "none")
    for module in (records, results):
        monkeypatch.setattr(module, "end_where_it_fails", lambda *command: asked.append(command))
    monkeypatch.chdir(EXAMPLES.parent)
    config = configure.load(Path("configs/small/pretrain.yaml"), [f"run.dir={tmp_path / 'seeds' / 'run'}"])
    assert set(config.evaluate.splits) == {"validation", "test"} and config.evaluate.text
    records.run_stage(config, {"test": "pairs"}, "2")
    (program, run, file, *procs) = asked[0]
    written = configure.load(file)
    assert (program.name, run, procs) == ("xc-train", "run", ["--procs", "2"])
    assert written.evaluate.splits == {"test": "pairs"} and written.evaluate.text is None and not written.track.wandb
    assert file.with_suffix("") == Path(written.run.dir)
    monkeypatch.setattr(results, "RUNS", tmp_path / "seeds")
    monkeypatch.setattr(results.control, "less_of", lambda run, seed: [0.1, 0.1])
    results.run_of(0).path.mkdir(parents=True)
    with pytest.raises(UserError, match="no control in"):  # before hours of training
        results.train(0, "2")
    monkeypatch.setattr(results.control, "RUNS", tmp_path / "control")
    results.control.run_of(results.control.best(), 0).final.mkdir(parents=True)
    results.train(0, "2")
    suites = [command for command in asked if "eval" in command]
    assert len(suites) == 2 and all("--data" in command for command in suites), "the run's config names none but its pairs"


def test_a_check_without_runs_trains_nothing(monkeypatch, tmp_path):
    import ablation
    import results

    document = tmp_path / "document.md"
    document.write_text("# Figures\n")
    for program in (results, ablation):  # three_stages.py has no seeds
        with pytest.raises(FileNotFoundError):
            check(monkeypatch, program, document)
    assert [file.name for file in tmp_path.iterdir()] == ["document.md"]

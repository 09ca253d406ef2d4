"""The report: what it promises about replayed steps, lives, missing figures and hostile text, on run directories written line by line."""

import json
import re
from pathlib import Path

import pytest
from chromium import browser

from data_pipeline import jsonl
from data_pipeline.errors import UserError
from data_pipeline.inspect.charts import draw, nice_ticks
from data_pipeline.read.ledger import BadEntry, Ledger
from train.report.build import series, write_report
from train.report.collect import Fate, Step, collect
from train.report.held_out import verdict
from train.run_dir import RunDir, write_json

NOW = 1_800_000_000.0
SPLITS = ("unseen_picture/validation", "unseen_picture/test", "unseen_concept/validation", "unseen_concept/test")
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def make_run(folder: Path, stage: str) -> RunDir:
    """A run directory with a config and nothing else."""
    run = RunDir(folder / stage)
    run.create()
    run.config.write_text(
        f"run: {{name: demo-{stage}, dir: {run.path}, stage: {stage}}}\n"
        "data: {sources: {pairs: {path: examples/pairs}}}\ndeepspeed: {stage: 2}\n"
    )
    return run


def start(run: RunDir, life: int, at: float, resumed_from: int | None = None) -> None:
    jsonl.append(run.lives, [{"life": life, "event": "start", "time": NOW + at, "resumed_from": resumed_from, "world": 2}])


def end(run: RunDir, life: int, at: float, code: int, reason: str, step: int) -> None:
    jsonl.append(run.lives, [{"life": life, "event": "end", "time": NOW + at, "code": code, "reason": reason, "step": step}])


def log(run: RunDir, life: int, steps: range, loss: float) -> None:
    for step in steps:
        metrics = {"loss/train": loss, "loss_by_source/pairs": loss, "tokens_by_source/pairs": 10, "throughput/step_s": 0.5}
        jsonl.append(run.metrics, [{"step": step, "life": life, **metrics, "throughput/tokens_per_s": 20.0, "health/skipped_steps": 0}])


def finished(folder: Path, stage: str, begins: float, seconds: float) -> RunDir:
    run = make_run(folder, stage)
    start(run, 1, begins)
    log(run, 1, range(1, 5), 3.0)
    end(run, 1, begins + seconds, 0, "done", 4)
    return run


def evaluated(run: RunDir, offset: float, sees: bool = True, caption: str = "a red fox") -> None:
    """Held-out figures that differ by run, split and name, so that none can be taken for another."""
    splits = {}
    for i, name in enumerate(SPLITS):
        figures = {"pictures": 200, "nll_blind": 4.0 + offset + i / 10, "stderr": {"nll_blind": 0.01}}
        if sees:
            figures |= {"nll_right": 1.0 + offset + i / 10, "nll_wrong": 2.0 + offset + i / 10, "retrieval_of_10": 0.5 + offset / 10}
            figures |= {
                "greedy_exact": 0.25,
                "samples": [{"key": "k1", "reference": caption, "generated": caption, "retrieved": "no", "image": PIXEL}],
            }
            figures["stderr"] |= {"nll_right": 0.02, "nll_wrong": 0.03, "retrieval_of_10": 0.04, "greedy_exact": 0.05}
        splits[name] = figures
    text = {"nll": 5.0 + offset, "stderr": 0.1, "tokens": 99, "logits_sha256": f"{'ab' if run.path.name != 'sft' else 'cd'}" * 32}
    write_json(
        run.evaluation, {"weights": "w", "step": 4, "dtype": "torch.bfloat16", "plora_b_norm": 7.0 + offset, "splits": splits, "text": text}
    )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Three finished stages with figures."""
    evaluated(finished(tmp_path, "pretrain", 200, 30), 0.1)
    evaluated(finished(tmp_path, "language", 100, 20), 0.0, sees=False)
    evaluated(finished(tmp_path, "sft", 300, 40), 0.2)
    return tmp_path


def killed_and_resumed(folder: Path) -> RunDir:
    """Life 1 is killed after step 7; life 2 goes on from the checkpoint of step 4, is stopped at 10; life 3 ends at 12."""
    run = make_run(folder, "pretrain")
    start(run, 1, 0)
    log(run, 1, range(1, 8), 9.0)
    start(run, 2, 60, resumed_from=4)
    log(run, 2, range(5, 11), 2.0)
    end(run, 2, 70, 75, "stopped on request (SIGTERM)", 10)
    start(run, 3, 100, resumed_from=10)
    log(run, 3, range(11, 13), 1.0)
    end(run, 3, 104, 0, "done", 12)
    return run


def test_replayed_steps_count_once_and_the_newest_life_wins(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path)
    (stage,) = collect(tmp_path)
    assert [s.number for s in stage.steps] == list(range(1, 13))
    assert [s.values["loss/train"] for s in stage.steps] == [9.0] * 4 + [2.0] * 6 + [1.0] * 2
    assert stage.undone_steps == 3


def test_steps_that_a_later_life_went_back_before_are_undone_also_before_they_are_replayed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "pretrain")
    start(run, 1, 0)
    log(run, 1, range(1, 9), 9.0)
    start(run, 2, 60, resumed_from=4)
    log(run, 2, range(5, 7), 2.0)
    (stage,) = collect(run.path)
    assert [s.number for s in stage.steps] == [1, 2, 3, 4, 5, 6]


def test_the_newest_life_wins_also_where_lives_are_not_known(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path).lives.unlink()
    (stage,) = collect(tmp_path)
    assert [s.values["loss/train"] for s in stage.steps] == [9.0] * 4 + [2.0] * 6 + [1.0] * 2


def test_a_killed_life_shows_as_killed_and_the_next_as_resumed(tmp_path: Path) -> None:
    run = killed_and_resumed(tmp_path)
    (stage,) = collect(tmp_path)
    assert [life.fate for life in stage.lives] == [Fate.killed, Fate.stopped, Fate.done]
    assert [life.resumed_from for life in stage.lives] == [None, 4, 10]
    assert [life.last_step for life in stage.lives] == [7, 10, 12]
    page = write_report(run.path).read_text()
    lives = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split('class="lives"')[1].split("</ol>")[0]))
    assert re.search(r"Life 1 killed started, reached step 7; 3 steps done again", lives)
    assert re.search(r"Life 2 stopped resumed from step 4, reached step 10", lives)
    assert "life 1 killed after step 7; life 2 went on from step 4" in page


def test_a_rank_that_was_killed_is_a_killed_life_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, "pretrain")
    start(run, 1, 0)
    log(run, 1, range(1, 4), 2.0)
    end(run, 1, 9, 1, "a rank was killed", 50)  # the launcher's guess: it does not know how far the ranks were
    (life,) = collect(tmp_path)[0].lives
    assert (life.fate, life.last_step, life.seconds) == (Fate.killed, 3, 9.0)


def test_training_time_of_a_life_without_an_end_is_that_of_its_steps(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path)
    (stage,) = collect(tmp_path)
    assert [life.seconds for life in stage.lives] == [3.5, 10.0, 4.0]
    assert stage.train_seconds == 17.5
    assert stage.kept_seconds == 6.0


def test_a_life_that_beats_is_running_and_one_that_does_not_is_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "pretrain")
    start(run, 1, 0)
    log(run, 1, range(1, 4), 2.0)
    write_json(run.heartbeat, {"step": 3, "phase": "train", "time": NOW + 40})
    assert collect(tmp_path, now=NOW + 50)[0].lives[0].fate is Fate.running
    (life,) = collect(tmp_path, now=NOW + 5000)[0].lives
    assert (life.fate, life.seconds) == (Fate.killed, 40.0)


def test_summary_has_the_promised_keys_and_the_figures_of_the_test_halves(demo: Path) -> None:
    write_report(demo)
    summary = json.loads((demo / "summary.json").read_text())
    assert set(summary) == {
        "stages", "text_nll", "text_logits_sha256", "plora_b_norm", "train_seconds", "resumes", "ledger",
    }  # fmt: skip
    assert set(summary["stages"]) == {"pretrain", "sft"}
    figures = {"nll_right", "nll_wrong", "nll_language_model", "retrieval_of_10", "greedy_exact", "stderr"}
    for stage in summary["stages"].values():
        assert set(stage) == {"unseen_picture", "unseen_concept"}
        assert all(set(split) == figures for split in stage.values())
    picture, concept = summary["stages"]["pretrain"]["unseen_picture"], summary["stages"]["sft"]["unseen_concept"]
    assert picture["nll_right"] == pytest.approx(1.2)
    assert picture["nll_wrong"] == pytest.approx(2.2)
    assert picture["nll_language_model"] == pytest.approx(4.1)
    assert picture["retrieval_of_10"] == pytest.approx(0.51)
    assert (picture["stderr"]["nll_right"], picture["stderr"]["nll_language_model"]) == (0.02, 0.01)
    assert concept["nll_right"] == pytest.approx(1.5)
    assert concept["nll_language_model"] == pytest.approx(4.3)
    assert summary["text_nll"] == pytest.approx({"before": 5.0, "after_pretrain": 5.1, "after_sft": 5.2})
    assert summary["text_logits_sha256"] == {"before": "ab" * 32, "after_pretrain": "ab" * 32}
    assert summary["plora_b_norm"] == {"after_pretrain": pytest.approx(7.1)}
    assert summary["train_seconds"] == {"language": 20.0, "pretrain": 30.0, "sft": 40.0, "total": 90.0}
    assert summary["resumes"] == 0
    assert summary["ledger"] == {"index": {}, "run": {}}


def test_stages_come_in_order_of_their_start(demo: Path) -> None:
    finished(demo, "compose", 400, 10)
    assert [s.stage for s in collect(demo)] == ["language", "pretrain", "sft", "compose"]


def test_resumes_are_counted(tmp_path: Path) -> None:
    write_report(killed_and_resumed(tmp_path).path.parent)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resumes"] == 2
    assert summary["train_seconds"] == {"language": None, "pretrain": 17.5, "sft": None, "total": 17.5}


def test_ledger_counts_a_damaged_sample_once_though_two_stages_read_it(demo: Path) -> None:
    for stage in ("pretrain", "sft"):
        damage = {"source": "pairs", "shard": "a.tar", "key": "k", "offset": 512, "size": 9, "reason": "no caption"}
        (demo / stage / "ledger").mkdir()
        jsonl.append(demo / stage / "ledger" / "index.jsonl", [damage])
    for step in (3, 3, 4):  # step 3 was replayed
        Ledger(demo / "pretrain", 0).write(step, [BadEntry("pairs", "a.tar", "bad<key", 1024, 9, "image cannot be decoded: truncated")])
    page = write_report(demo).read_text()
    assert json.loads((demo / "summary.json").read_text())["ledger"] == {"index": {"no caption": 1}, "run": {"image cannot be decoded": 2}}
    assert "bad&lt;key" in page


def test_a_run_without_evaluation_gives_a_page_that_says_so(tmp_path: Path) -> None:
    finished(tmp_path, "pretrain", 0, 10)
    page = write_report(tmp_path).read_text()
    assert page.count("not measured") >= 6
    assert "identical" not in page
    split = json.loads((tmp_path / "summary.json").read_text())["stages"]["pretrain"]["unseen_picture"]
    assert set(split.values()) == {None}


@pytest.mark.parametrize("named", [("validation", "test"), ("birds/validation", "birds/test"), ("birds",)])
def test_held_out_data_of_any_name_has_its_tiles_rows_and_pictures(tmp_path, named) -> None:
    heading = "Held-out pictures" if "test" in named else "birds"
    run = finished(tmp_path, "pretrain", 0, 10)
    evaluated(run, 0.1)
    evaluation = json.loads(run.evaluation.read_text())
    evaluation["splits"] = dict(zip(named, list(evaluation["splits"].values())[-len(named) :], strict=True))
    evaluation["splits"][named[-1]]["pictures"] = 368
    write_json(run.evaluation, evaluation)
    page = write_report(tmp_path).read_text()
    assert f"Right caption picked out of ten, {heading.lower()}" in page and "pretrain: above chance on 368 pictures" in page
    half = "" if named == ("birds",) else "test half"
    assert f"<h3>{heading}{half and f', {half}'}</h3>" in page and "<dt>picks</dt>" in page
    assert f"<b>{heading}.</b> The first 1 {half and f'of the {half} '}in order" in page
    assert ("each split halved" in page) == bool(half)
    assert page.count('<td class="left">validation</td>') == len(named) - 1
    assert page.count(f'<td class="left">{"test" if half else "all"}</td>') == 1
    assert "Unseen" not in page
    figures = json.loads((tmp_path / "summary.json").read_text())["stages"]["pretrain"]
    assert {name: split["nll_right"] for name, split in figures.items()} == {
        named[-1].removesuffix("/test").replace("test", "held_out"): evaluation["splits"][named[-1]]["nll_right"]
    }


def test_a_run_that_never_started_gives_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, "sft")
    page = write_report(tmp_path).read_text()
    assert "not started" in page
    assert "metrics.jsonl has no whole line" in page


def test_text_logits_pass_and_fail_are_told_apart(demo: Path) -> None:
    assert "identical" in write_report(demo).read_text()
    evaluation = json.loads((demo / "pretrain" / "evaluation.json").read_text())
    evaluation["text"]["logits_sha256"] = "ef" * 32
    write_json(demo / "pretrain" / "evaluation.json", evaluation)
    page = write_report(demo).read_text()
    assert "differ</div>" in page
    assert "identical" not in page


def test_page_loads_nothing_and_scripts_in_captions_stay_text(demo: Path) -> None:
    hostile = "</p><script>alert(1)</script><img src=https://evil.example/x>'\"{{ 7 * 7 }}"
    run = RunDir(demo / "sft")
    evaluated(run, 0.2, caption=hostile)
    for stage in ("pretrain", "sft"):
        evaluation = json.loads((demo / stage / "evaluation.json").read_text())
        evaluation["splits"]["unseen_concept/test"]["samples"][0]["image"] = "https://evil.example/pixel.png"
        write_json(demo / stage / "evaluation.json", evaluation)
    hostile_source = "</script><b>'x"
    line = {"step": 5, "life": 1, "loss/train": 1.0, f"loss_by_source/{hostile_source}": 1.0, f"tokens_by_source/{hostile_source}": 3}
    jsonl.append(run.metrics, [line])
    run.config.write_text(run.config.read_text() + f"slurm: {{account: {json.dumps(hostile)}}}\n")
    page = write_report(demo).read_text()
    assert page.count("<script") == page.count("</script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "49" not in re.sub(r"\d{3,}", "", page.split("<article", 1)[1].split("</article>", 1)[0])
    tags = " ".join(re.findall(r"<[a-zA-Z][^>]*>", page.split("<script>")[0]))
    assert not re.search(r"(src|href|srcset|action|data)\s*=\s*[\"']?\s*(https?:)?//", tags)
    assert not re.search(r"url\(|@import|<link|<iframe|<base", page)
    assert not re.search(r"import\s*\(|import .* from|fetch\(|XMLHttpRequest", page.split("<script>")[1])
    assert "data-lines='[" in page
    for attribute in re.findall(r"data-lines='([^']*)'", page):
        json.loads(attribute)


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser_loads_nothing_shows_curves_and_pictures_and_fits_its_width(demo: Path, tmp_path: Path, width: int) -> None:
    page = write_report(demo, tmp_path / "elsewhere.html")
    assert not (demo / "report.html").exists()
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, width)
        sizes = chromium.run("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth))))")
        assert len(sizes) >= 2 and set(sizes) == {1}
        assert chromium.requests == [page.as_uri()]
        assert chromium.errors == []
        assert chromium.run("document.documentElement.scrollWidth") == width
        curves = chromium.run(
            "[...document.querySelectorAll('svg polyline, svg path')].filter(c => c.getBoundingClientRect().width > 50).length"
        )
        assert curves >= 3, "a loss curve a stage"


def test_a_half_written_last_line_is_ignored_and_damage_before_it_is_said(tmp_path: Path) -> None:
    run = finished(tmp_path, "pretrain", 0, 10)
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "life": 1, "loss/train": 2.0')
    (stage,) = collect(tmp_path)
    assert [s.number for s in stage.steps] == [1, 2, 3, 4]
    assert stage.notes == []
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "life": 2, "loss/train": 2.0}\n')
    assert "metrics.jsonl: 1 damaged line left out" in write_report(tmp_path).read_text()


def test_damaged_small_files_are_said_and_cost_nothing_else(demo: Path) -> None:
    (demo / "sft" / "evaluation.json").write_text("{")
    (demo / "pretrain" / "lives.jsonl").unlink()
    page = write_report(demo).read_text()
    assert "evaluation.json cannot be read" in page
    assert "No life has begun" in page


def test_not_finite_values_are_no_points_and_no_json(demo: Path) -> None:
    run = RunDir(demo / "pretrain")
    jsonl.append(run.metrics, [{"step": 5, "life": 1, "loss/train": float("nan"), "optim/grad_norm": float("inf")}])
    evaluation = json.loads(run.evaluation.read_text())
    evaluation["splits"]["unseen_picture/test"]["nll_wrong"] = float("nan")
    write_json(run.evaluation, evaluation)
    page = write_report(demo).read_text()
    assert "NaN" not in (demo / "summary.json").read_text()
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_a_gallery_marks_right_and_wrong_captions(demo: Path) -> None:
    page = write_report(demo).read_text()
    card = page.split("<article", 1)[1].split("</article>", 1)[0]
    assert re.search(r'writes</dt><dd class="ok">a red fox', card)
    assert re.search(r'picks</dt><dd class="no">no', card)
    assert PIXEL in card
    assert "The first 1 of the test half in order of the key's SHA-256" in page


def test_what_was_measured_and_written_on_the_way_is_shown_as_the_newest_life_left_it(tmp_path: Path) -> None:
    run = killed_and_resumed(tmp_path)
    figures = {"picture/nll_right": 1.0, "picture/nll_wrong": 2.0, "picture/nll_blind": 3.0, "text/nll": 4.0, "text/minus_base": 0.5}
    run.validation.mkdir()
    for step, life, words in ((3, 1, "first"), (6, 1, "undone"), (6, 2, "<b>again"), (9, 2, "last")):
        jsonl.append(run.metrics, [{"step": step, "life": life, **{f"validation/{name}": value for name, value in figures.items()}}])
        caption = {"split": "picture", "key": "k1", "reference": "a red fox", "generated": words}
        jsonl.append(run.validation / "captions.jsonl", [{"step": step, "life": life, "captions": [caption]}])
    write_json(run.validation / "pictures.json", {"k1": PIXEL, "k2": "https://evil.example/x"})
    page = write_report(tmp_path).read_text()
    for heading in ("Nats a token, picture", "Nats a token, text alone", "Text: nats above the start of the stage"):
        assert f"<h4>{heading}</h4>" in page
    card = page.split("What it wrote on the way")[1].split("</article>")[0]
    assert PIXEL in card
    found = re.findall(r"<dt>step (\d+)</dt><dd>(.*?)</dd>", card)
    assert found == [("3", "first"), ("6", "&lt;b&gt;again"), ("9", "last")]
    assert "evil.example" not in page


def test_retrieval_is_called_above_chance_only_where_it_can_be_told() -> None:
    assert verdict((0.5, 0.03), 200) == "above chance"
    assert verdict((0.12, 0.03), 200) == "cannot be told from chance"
    assert verdict((0.26, 0.03), 200, 0.25) == "cannot be told from chance", "of four candidates"
    assert verdict(None, 200) == "not measured"


def test_long_runs_are_drawn_as_exact_means() -> None:
    steps = [Step(n, 1, {"loss": float(n % 2), "tokens": 3.0 if n % 2 else 1.0}) for n in range(1, 1201)]
    chart = draw([series(steps, "loss", "loss", "red", ["tokens"])], smooth=True)
    assert chart is not None
    assert (chart.span, len(chart.points[0]["x"]), chart.last) == (2, 600, 1200)
    assert set(chart.points[0]["y"]) == {0.75}
    assert draw([series(steps, "none", "none", "red")], smooth=True) is None


def test_ticks_are_round_numbers_within_the_limits() -> None:
    assert nice_ticks(0, 306, 6) == [0, 100, 200, 300]
    assert nice_ticks(3.9, 8.6, 4) == [4, 6, 8]


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run directory.*give run\.dir"):
        write_report(tmp_path)

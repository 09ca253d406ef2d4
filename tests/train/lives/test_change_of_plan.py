"""A run may go on with another mix where it is told how; a phase of the mix begins where the config says."""

import json
import shutil

import pytest
from stages import Life, live_together, make_stage

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_USER
from train.cli import main

NEW_MIX = ("data.sources.text.weight=5", "data.sources.documents.weight=0", "data.global_batch=6")


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses."""
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == EXIT_USER
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def lived(demo, environment, tmp_path_factory):
    """Copies of one run, gone on with under another mix in both ways, one of them twice; and a run with phases."""
    folder = tmp_path_factory.mktemp("change")
    settings = {"train": {"steps": 10}}
    phases = {"window": 20, "phases": [{"at": 0.5, "weights": {"text": 0, "documents": 0}}]}
    start = make_stage(demo, environment, folder / "start", {"train": {"steps": 10}, "checkpoint": {"keep_last": 100}})
    made = {name: make_stage(demo, environment, folder / name, settings) for name in ("repeat", "skip")}
    made["phases"] = make_stage(demo, environment, folder / "phases", {**settings, "data": phases})
    live_together([Life(start), Life(made["phases"])])
    for how in ("repeat", "skip"):
        shutil.copytree(start.run.path, made[how].run.path)
        made[how].forget_after(4)
    live_together([Life(made[how], (*NEW_MIX, f"data.change={how}")) for how in ("repeat", "skip")])
    return start, made


@pytest.mark.parametrize("how", ["repeat", "skip"])
def test_a_run_goes_on_with_another_mix_where_it_is_told_how_and_says_what_that_does(lived, how):
    start, made = lived
    before, one = start.losses(), made[how]
    assert one.resumed_from() == [None, 4]
    assert "the mix changed after step 4: window 0 (documents 93, " in one.said()
    assert ("is drawn again" if how == "repeat" else "is left after 16 packs") in one.said()
    assert sorted(one.losses()) == list(range(1, 11))
    assert all(one.losses()[step] == before[step] for step in range(1, 5))
    assert one.losses()[5] != before[5]

    old, new = (json.loads((one.run.checkpoints / f"step-{step:08d}" / "state.json").read_text()) for step in (8, 10))
    assert old["origin"] == new["origin"] == {"window": int(how == "skip"), "step": 4, "ordinals": new["origin"]["ordinals"]}
    assert new["drawn"]["after"]["documents"] == new["origin"]["ordinals"]["documents"]
    assert new["drawn"]["after"]["text"] > new["origin"]["ordinals"]["text"]


def test_without_being_told_another_mix_is_refused(lived, capfd):
    start, _ = lived
    said = refusal(capfd, str(start.config), *NEW_MIX)
    assert "data.sources.documents.weight differs" in said
    assert "data.change" in said


def test_the_new_mix_is_itself_gone_on_with_and_not_changed_again(lived):
    _, made = lived
    changed = made["repeat"]
    before, weights = changed.losses(), changed.weights()
    changed.forget_after(8)
    live_together([Life(changed, (*NEW_MIX, "data.change=repeat"))])
    assert "the mix changed" not in changed.said()
    assert changed.resumed_from() == [None, 4, 8]
    assert changed.losses() == before
    assert changed.weights() == weights


def test_a_phase_without_room_is_refused_before_anything_starts(stage, capfd):
    made = stage(data={"phases": [{"at": 0.5, "weights": {"text": 4}}]}, train={"steps": 10})
    assert "the phase at 0.5 gets no window" in refusal(capfd, str(made.config))
    assert not made.run.path.exists()


def test_a_run_with_phases_trains_on_the_mix_of_each(lived):
    _, made = lived
    text = [line["step"] for line in jsonl.read(made["phases"].run.metrics) if "loss_by_source/text" in line]
    assert min(text) == 1
    assert 5 <= max(text) <= 7

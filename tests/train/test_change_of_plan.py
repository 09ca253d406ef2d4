"""A run may go on with another mix where it is told how; a phase of the mix begins where the config says."""

import json

import pytest

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_USER

NEW_MIX = ("data.sources.text.weight=5", "data.sources.documents.weight=0", "data.global_batch=6")


@pytest.mark.parametrize("how", ["repeat", "skip"])
def test_a_run_goes_on_with_another_mix_where_it_is_told_how_and_says_what_that_does(stage, how):
    made = stage()
    process = made.start()
    made.kill_a_rank_after(5, process, 0)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_CRASH
    before = made.losses()
    refused = made.train(*NEW_MIX)
    assert refused.returncode == EXIT_USER
    assert "data.sources.documents.weight differs" in refused.stderr
    assert "data.change" in refused.stderr

    changed = made.start(*NEW_MIX, f"data.change={how}")
    if how == "repeat":  # the new mix is itself gone on with, not changed again
        made.kill_a_rank_after(9, changed, 1)
    said, errors = changed.communicate(timeout=240)
    assert "the mix changed after step 4: window 0 (documents 93, " in said, errors
    assert ("is drawn again" if how == "repeat" else "is left after 16 packs") in said
    if how == "repeat":
        again = made.train(*NEW_MIX, f"data.change={how}")
        assert again.returncode == EXIT_DONE, again.stderr
        assert "the mix changed" not in again.stdout
    assert sorted(made.losses()) == list(range(1, 11))
    assert all(made.losses()[step] == before[step] for step in range(1, 5))

    old, new = (json.loads((made.run.checkpoints / f"step-{step:08d}" / "state.json").read_text()) for step in (8, 10))
    assert old["origin"] == new["origin"] == {"window": int(how == "skip"), "step": 4, "ordinals": new["origin"]["ordinals"]}
    assert new["drawn"]["after"]["documents"] == new["origin"]["ordinals"]["documents"]
    assert new["drawn"]["after"]["text"] > new["origin"]["ordinals"]["text"]


def test_a_phase_without_room_is_refused_before_anything_starts(stage):
    made = stage(data={"phases": [{"at": 0.5, "weights": {"text": 4}}]})
    refused = made.train()
    assert refused.returncode == EXIT_USER
    assert "the phase at 0.5 gets no window" in refused.stderr
    assert not made.run.path.exists()


def test_a_run_with_phases_trains_on_the_mix_of_each(stage):
    phases = [{"at": 0.5, "weights": {"text": 0, "documents": 0}}]
    made = stage(data={"window": 20, "phases": phases})
    assert made.train().returncode == EXIT_DONE
    lines = [json.loads(line) for line in made.run.metrics.read_text().splitlines()]
    text = [line["step"] for line in lines if "loss_by_source/text" in line]
    assert min(text) == 1
    assert 5 <= max(text) <= 7

"""A rank that falls silent ends the job in time, with everybody's stacks and a code that is tried again; nothing is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import EXIT_TRY_AGAIN
from train.config import WatchdogConfig
from train.launch import MUTE_S, Pulse, _watch
from train.run_dir import RunDir, write_json
from train.watchdog import TICK_S, Silence, Watchdog

HANGING = str(Path(__file__).parents[2] / "support" / "hanging")
LIMIT_S = 8


@pytest.fixture
def hanging(stage):
    """A run whose ranks hang on a signal, with short limits."""
    made = stage(watchdog={"start": 240, "data": LIMIT_S, "forward": LIMIT_S, "checkpoint": 60}, train={"steps": 400})
    path = os.pathsep.join([HANGING, os.environ.get("PYTHONPATH", "")])
    return replace(made, environment={**made.environment, "PYTHONPATH": path})


def stacks(run: RunDir) -> dict[int, str]:
    return {rank: run.stacks(rank).read_text() for rank in (0, 1)}


def test_a_rank_that_sleeps_for_ever_or_hangs_in_c_is_reported_with_all_stacks_and_the_same_command_goes_on(hanging):
    process = hanging.start()
    hanging.wait_for(3, process)
    ranks = hanging.rank_pids()
    os.kill(ranks[1], signal.SIGALRM)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == EXIT_TRY_AGAIN, errors
    (line,) = errors.strip().splitlines()
    assert re.search("rank 1 was silent for|ranks 0, 1 were silent for", line), line  # the latter if both had come as far
    assert "the same command goes on" in line
    found = stacks(hanging.run)
    assert "sleep_for_ever" in found[1]
    assert "sleep_for_ever" not in found[0]
    assert "train/loop.py" in found[0], "the rank that waited shows where"
    assert not hanging.rank_pids()

    before = max(hanging.losses())
    again = hanging.start()
    hanging.wait_for(before + 2, again, life=2)
    os.kill(hanging.rank_pids()[0], signal.SIGVTALRM)
    _, errors = again.communicate(timeout=400)
    assert again.returncode == EXIT_TRY_AGAIN, errors
    assert "rank 0 does not answer at all" in errors
    assert "hold_the_interpreter" in stacks(hanging.run)[0]
    assert not hanging.rank_pids()


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def test_beats_keep_it_quiet_and_the_first_step_has_the_limit_of_the_start(run):
    watchdog = Watchdog(WatchdogConfig(start=3600, data=2 * TICK_S, forward=2 * TICK_S), run, 0, 1)
    watchdog.beat(0, "data")
    time.sleep(4 * TICK_S)
    assert (run.path / "heartbeat.json").read_text().count('"start"') == 1
    watchdog.started()
    for step in range(8):
        watchdog.beat(step, "forward")
        time.sleep(TICK_S / 2)
    watchdog.close()
    assert not run.hang.exists()
    assert run.stacks(0).read_text() == ""


SLEEPING = """
import sys, time
from train import watchdog
from train.config import WatchdogConfig
from train.run_dir import RunDir
run, phase, rank, world, limit = sys.argv[1:]
watchdog.LOOK_AFTER_S = 1
limits = {name: float(limit) if name == phase else 3600 for name in ("start", "data", "forward", "checkpoint")}
watchdog = watchdog.Watchdog(WatchdogConfig(**limits), RunDir(run), int(rank), int(world))
if phase != "start":
    watchdog.started()
watchdog.beat(7, phase)
def sleep_in_this_phase():
    time.sleep(60)
sleep_in_this_phase()
"""


@pytest.mark.parametrize("phase", ["start", "data", "forward", "checkpoint"])
def test_each_phase_has_a_limit_of_its_own_and_the_outcome_names_it(run, phase):
    began = time.monotonic()
    rank = subprocess.run([sys.executable, "-c", SLEEPING, str(run.path), phase, "0", "1", "0.5"], timeout=50)
    assert rank.returncode == EXIT_TRY_AGAIN
    assert time.monotonic() - began < 50, "and not when the sleep is over"
    assert f"in phase {phase} after step 7, watchdog.{phase} is 0.5" in run.read_outcome()["reason"]
    assert "sleep_in_this_phase" in run.stacks(0).read_text()


def test_all_ranks_dump_and_leave_when_one_found_a_silence_whose_own_limits_are_long(run):
    ranks = [
        subprocess.Popen([sys.executable, "-c", SLEEPING, str(run.path), "data", str(rank), "3", limit])
        for rank, limit in enumerate(["3600", "3600", "2"])
    ]
    assert {rank.wait(timeout=50) for rank in ranks} == {EXIT_TRY_AGAIN}
    assert "ranks 0, 1, 2 were silent" in run.read_outcome()["reason"]
    assert all("sleep_in_this_phase" in run.stacks(rank).read_text() for rank in range(3))


def test_a_silence_is_on_the_disk_before_another_rank_is_waited_for(run, monkeypatch):
    watchdog = Watchdog(WatchdogConfig(), run, 0, 1)
    synced, done = [], []
    monkeypatch.setattr("train.watchdog.os.fsync", synced.append)
    monkeypatch.setattr("train.watchdog.os._exit", done.append)
    monkeypatch.setattr(watchdog, "_is_first", lambda own: done.append(list(synced)) or True)
    watchdog._end(Silence(0, "data", 3, 8, seconds=9.0, time=time.time()))
    assert done[0] == [watchdog._stacks.fileno()] and done[1] == EXIT_TRY_AGAIN
    watchdog.close()


def test_of_many_ranks_that_find_a_silence_at_once_one_reads_what_all_say(run):
    own = Silence(0, "data", 3, 8, seconds=9.0, time=time.time())
    watchdogs = [Watchdog(WatchdogConfig(), run, rank, 16) for rank in range(16)]
    with ThreadPoolExecutor(16) as pool:
        first = list(pool.map(lambda watchdog: watchdog._is_first(own), watchdogs))
    for watchdog in watchdogs:
        watchdog.close()
    assert sum(first) == 1


def test_a_rank_that_waits_no_longer_than_usual_looks_at_no_file_of_others(run, monkeypatch):
    looked = []
    monkeypatch.setattr("train.watchdog.found_silence", lambda run, _: looked.append(run))
    hanging = RunDir(run.path)
    usual = Watchdog(WatchdogConfig(start=600), run, rank=1, world=2)
    hung = Watchdog(WatchdogConfig(start=4 * TICK_S), hanging, rank=1, world=2)
    usual._end = hung._end = lambda own: None
    time.sleep(8 * TICK_S)
    usual.close()
    hung.close()
    assert set(looked) == {hanging}, "only the one that was silent for half of its limit"


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ({0: 8, 1: 7, 2: 9}, "rank 1 was silent for 9 s in phase data after step 3"),
        ({0: 7, 1: 7, 2: 8}, "ranks 0, 1 were silent for 9 s in phase data after step 3"),
        ({0: 8, 2: 7}, "rank 1 does not answer at all, rank 2 was silent for 9 s in phase data after step 3"),
    ],
    ids=["one behind", "two as far as each other", "one mute"],
)
def test_the_ranks_that_the_others_wait_for_are_named_whoever_found_the_silence(run, beats, named):
    found = [Silence(rank, "data" if done == 7 else "forward", 3, done, seconds=9.0, time=0.0) for rank, done in beats.items()]
    watchdog = Watchdog(WatchdogConfig(), run, 0, 3)
    assert named in watchdog._reason(found)
    watchdog.close()


def test_a_heartbeat_that_stands_still_longer_than_any_limit_is_seen_from_outside_whatever_the_clock_does(run, monkeypatch):
    ticks = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: ticks)
    run.beat(9, "data")  # of a life before
    pulse = Pulse(run, WatchdogConfig(start=10, data=10, forward=10, checkpoint=20))
    for_ever = Pulse(run, WatchdogConfig(0, 0, 0, 0))
    ticks += 1e6
    assert not pulse.silent_s(), "this life has not beaten yet: the watchdogs have the limit of the start"
    for clock in (time.time() + 1e5, time.time() - 1e5):
        write_json(run.heartbeat, {"step": 3, "phase": "data", "time": clock})
        assert not pulse.silent_s()
        ticks += MUTE_S + 19
        assert not pulse.silent_s()
    ticks += 2
    assert pulse.silent_s() == MUTE_S + 21
    assert not for_ever.silent_s(), "0 = for ever"


def test_ranks_of_which_none_answers_are_ended_from_outside(run, monkeypatch):
    monkeypatch.setattr(Pulse, "silent_s", lambda pulse: 99.0)
    rank = subprocess.Popen(["sleep", "100"], start_new_session=True)
    _watch([rank], run, WatchdogConfig())
    assert rank.returncode
    said = run.read_outcome()
    assert said["code"] == EXIT_TRY_AGAIN and "rank 0 does not answer at all, since 99 s" in said["reason"]

"""A stop request is heard from the first moment of a rank on, and never mistaken for a crash."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_pipeline.errors import EXIT_TRY_AGAIN, UserError
from train import run_dir
from train.run_dir import RunDir
from train.signals import REQUESTS, TORCHRUN, StopRequest

STARTING = """
import sys, time
from pathlib import Path
from train.run_dir import RunDir
from train.signals import leave_when_asked
leave_when_asked(RunDir(Path(sys.argv[1])))
print("starting up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_rank_that_is_asked_to_stop_before_it_trains_leaves_at_once_and_says_so(tmp_path, number):
    rank = subprocess.Popen([sys.executable, "-c", STARTING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout.readline() == "starting up\n"
    rank.send_signal(number)
    assert rank.wait(timeout=50) == EXIT_TRY_AGAIN
    outcome = RunDir(tmp_path).read_outcome()
    assert outcome["code"] == EXIT_TRY_AGAIN
    assert f"asked to stop ({number.name}) before the first step" in outcome["reason"]


def test_under_torchrun_only_rank_0_says_so_since_others_may_be_of_a_command_that_is_refused(tmp_path):
    environment = {**os.environ, "RANK": "1", TORCHRUN: "none"}
    rank = subprocess.Popen([sys.executable, "-c", STARTING, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    assert rank.stdout.readline() == "starting up\n"
    rank.terminate()
    assert rank.wait(timeout=50) == EXIT_TRY_AGAIN
    assert RunDir(tmp_path).read_outcome() is None


def test_only_rank_0_looks_for_the_stop_file_and_every_rank_hears_a_signal(tmp_path):
    before = {number: signal.getsignal(number) for number in REQUESTS}
    first, other = (StopRequest(RunDir(tmp_path), rank) for rank in (0, 1))
    try:
        assert first.reason() is other.reason() is None
        (tmp_path / "stop").touch()
        assert first.reason() == f"{tmp_path}/stop exists"
        assert other.reason() is None
        signal.raise_signal(signal.SIGUSR2)
        assert other.reason() == "SIGUSR2"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_until_its_first_step_a_run_that_is_asked_to_stop_leaves_at_once_whatever_it_loads_or_rehearses(stage):
    made = stage(data={"context": 16384}, train={"steps": 2})  # to rehearse the heaviest pack takes seconds
    process = made.start()
    while not made.run.events():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == EXIT_TRY_AGAIN, errors
    assert "asked to stop (SIGTERM) before the first step of this life; the same command goes on" in errors
    assert not made.run.metrics.exists() and not made.checkpoints()


def test_a_rank_may_open_as_many_files_as_the_system_allows_and_not_the_usual_thousand():
    program = "import resource as r; from data_pipeline.processes import open_many_files as o; o(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limited = f"ulimit -Sn 64; exec {sys.executable} -c '{program}'"
    assert subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=True).stdout == f"{most} {most}\n"


STUCK = """
import ctypes, multiprocessing, time
from data_pipeline.processes import begin_worker

def work():
    begin_worker(0)
    print(multiprocessing.current_process().pid, flush=True)
    ctypes.PyDLL(None).sleep(600)  # in C, and no other thread of it may run

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(600)
"""


def test_a_data_worker_ends_with_a_trainer_that_is_killed_even_where_it_is_stuck_in_c():
    trainer = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(trainer.stdout.readline()))
    time.sleep(0.5)  # so that it is in C
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 60
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)


def alive(process: psutil.Process) -> bool:
    """Not gone, nor dead with nobody to bury it."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_file_system_without_locks_is_said_in_one_line(tmp_path, monkeypatch):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    run = RunDir(tmp_path / "run")
    run.create()
    monkeypatch.setattr(run_dir.fcntl, "flock", unknown)
    with pytest.raises(UserError, match=r"cannot be locked: Function not implemented \(choose a run.dir .*flock"), run_dir.own(run):
        pass

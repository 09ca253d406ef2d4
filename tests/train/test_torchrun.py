"""Ranks that torchrun starts train as those of the command; how each life ended is in the run directory."""

import signal
import subprocess
import sys

from data_pipeline.errors import EXIT_DONE, EXIT_TRY_AGAIN


def test_a_run_under_torchrun_stops_goes_on_and_says_how_each_life_ended(stage):
    made = stage(train={"steps": 40})
    prepare = [sys.executable, "-m", "train.cli", "prepare", str(made.config)]
    said = subprocess.run(prepare, env=made.environment, capture_output=True, text=True)
    assert said.stdout == f"next: torchrun --nproc-per-node N -m train.rank {made.run.path}\n", said.stderr

    def life() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train.rank", str(made.run.path)]
        return subprocess.Popen(command, env=made.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first = life()
    made.wait_for(3, first)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=400)
    assert made.run.read_outcome()["code"] == EXIT_TRY_AGAIN
    step = made.run.read_outcome()["step"]
    assert 3 <= step < 40 and made.checkpoints()[-1] == step

    made.run.stop_file.touch()  # of a life before: it would end the next one at once
    second = life()
    _, errors = second.communicate(timeout=400)
    assert second.returncode == 0, errors
    assert made.run.read_outcome()["code"] == EXIT_DONE
    assert made.resumed_from() == [None, step]
    assert [event["code"] for event in made.run.events() if event["event"] == "end"] == [EXIT_TRY_AGAIN, EXIT_DONE]
    assert sorted(made.losses()) == list(range(1, 41))

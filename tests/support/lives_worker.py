"""One of the ranks that live the lives of many tests in one process group: each line of its input names a file of lives.

Starting ranks costs far more than the steps of a test: where the command itself is not what is tested, lives share their ranks. Each life
is `train` as a rank of `xc-train run` calls it, and leaves what that leaves: outcome, lives, logs. After each file the rank writes a byte
to the file descriptor that it was given.
"""

import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.errors import TryAgainError
from data_pipeline.part import fingerprint
from train import configure, loop
from train.device import choose
from train.ranks import Ranks, join
from train.run_dir import RunDir
from train.tracking.terminal import Terminal
from train.watchdog import Watchdog

SAID = "said.txt"


def with_nan_gradients(steps: list[int], micro_steps: int):
    """`build_model`, of a model in whose first trained weight the gradient of these steps is NaN; the first pass is the rehearsal's."""
    build = loop.build_model

    def broken(*arguments):
        built, calls = build(*arguments), []
        model = built.model
        model.register_forward_pre_hook(lambda *_: calls.append(None))
        weight = model.projector.get_parameter(next(name for name, _ in model.projector.named_parameters()))
        weight.register_hook(lambda grad: grad * torch.nan if (len(calls) - 2) // micro_steps + 1 in steps else grad)
        return built

    return broken


def live(job: dict[str, Any], ranks: Ranks) -> None:
    """One life."""
    config = configure.load(job["config"], job["overrides"])
    run = RunDir(config.run.dir)
    if ranks.rank == 0:
        run.create()
        run.config.write_text(configure.to_yaml(config))
    ranks.barrier()
    log = os.open(run.logs / f"rank-{ranks.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    steps = job["nan_gradients"].get(str(ranks.rank), [])
    patch = mock.patch.object(loop, "build_model", with_nan_gradients(steps, config.data.global_batch // ranks.world))
    read, otherwise = count(1), job["reads_otherwise"].get(str(ranks.rank))
    reading = mock.patch.object(loop, "fingerprint", lambda batches: fingerprint(batches) + (next(read) == otherwise))
    with patch, reading, (run.logs / SAID if ranks.rank == 0 else Path(os.devnull)).open("w") as said:
        watchdog = Watchdog(config.watchdog, run, ranks.rank, ranks.world)
        device = choose(config.train.precision, ranks.rank)
        try:
            ending = loop.train(config, run, ranks, device, Terminal(config.run.name, said), watchdog)
        except TryAgainError as error:  # on all ranks alike
            ending = loop.Ending(error.exit_code, str(error), 0)
        watchdog.close()
    if ranks.rank == 0:
        run.write_outcome(ending.code, ending.reason, ending.step)
        run.end_life(ending.code, ending.reason, ending.step)
    ranks.barrier()


def main() -> None:
    answers, linear = int(sys.argv[1]), F.linear
    ranks = join("gloo")
    for line in sys.stdin:
        for job in json.loads(Path(line.strip()).read_text()):
            live(job, ranks)
            F.linear = linear  # ZeRO-3 leaves its own behind, which sums in another order
        os.write(answers, b".")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

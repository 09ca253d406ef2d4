"""One rank of a run: `python -m train.rank RUN_DIR`, started by `xc-train run`, torchrun or srun with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT set.

Invariant: however a rank ends without being killed, `outcome.json` says why, and its exit code is the outcome's.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import EXIT_CRASH, TryAgainError, UserError
from train import configure
from train.run_dir import RunDir, read_json


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (run_dir,) = sys.argv[1:] if argv is None else argv
    sys.exit(run_rank(Path(run_dir)))


def run_rank(run_dir: Path) -> int:
    """Trains as the rank that the environment describes, with the config of the run directory."""
    run = RunDir(run_dir)
    rank = int(os.environ.get("RANK", 0))
    terminal = _redirect_output(run, rank)

    import torch.distributed as dist

    from train.device import choose
    from train.loop import train
    from train.ranks import join
    from train.tracking.terminal import Terminal

    config = configure.read_resolved(run.path)
    speaker = Terminal(config.run.name, os.fdopen(terminal, "w"))
    try:
        device = choose(config.train.precision, int(os.environ.get("LOCAL_RANK", 0)))
        ranks = join(device.backend)
        ending = train(config, run, ranks, device, speaker)
        ranks.barrier()
        if rank == 0:
            run.write_outcome(ending.code, ending.reason, ending.step)
        dist.destroy_process_group()
        return ending.code
    except (UserError, TryAgainError) as error:
        run.write_outcome(error.exit_code, str(error), _last_step(run))
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective that this one will never join: leave at once, the launcher ends them.
        os._exit(error.exit_code)
    except Exception as error:  # noqa: BLE001  whatever it was, the outcome must say so before the process goes
        import traceback

        traceback.print_exc()
        run.write_outcome(
            EXIT_CRASH, f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", _last_step(run)
        )
        sys.stderr.flush()
        os._exit(EXIT_CRASH)


def _redirect_output(run: RunDir, rank: int) -> int:
    """Sends what libraries print to the rank's log; returns a descriptor for the terminal (rank 0) or for the log."""
    log = os.open(run.logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    terminal = os.dup(1) if rank == 0 else os.dup(log)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return terminal


def _last_step(run: RunDir) -> int:
    return int((read_json(run.heartbeat) or {}).get("step", 0))


if __name__ == "__main__":
    main()

"""One rank of a run: `python -m train.rank RUN_DIR`, started by `xc-train run`, torchrun or srun with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT set.

Invariant: however a rank ends without being killed, `outcome.json` says why, and its exit code is the outcome's.
"""

import errno
import gc
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import EXIT_CRASH, EXIT_USER, STORAGE_ERRORS, TryAgainError, UserError
from data_pipeline.processes import end_with_parent, keep_freed_memory, open_many_files
from train import configure
from train.run_dir import RunDir, own
from train.signals import TORCHRUN, leave_when_asked
from train.watchdog import Watchdog


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (run_dir,) = sys.argv[1:] if argv is None else argv
    open_many_files()
    end_with_parent()  # nobody would watch it, and its run directory is free to others
    with _owned(Path(run_dir)):
        sys.exit(run_rank(Path(run_dir)))


@contextmanager
def _owned(run_dir: Path) -> Iterator[None]:
    """Under torchrun, rank 0 does what `xc-train run` and a job script do before they start ranks: nobody else is there to do it."""
    if TORCHRUN not in os.environ or int(os.environ["RANK"]) != 0:
        yield
        return
    run = RunDir(run_dir)
    try:
        with own(run):
            run.forget_outcome()
            run.stop_file.unlink(missing_ok=True)
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run_rank(run_dir: Path) -> int:
    """Trains as the rank that the environment describes, with the config of the run directory."""
    run = RunDir(run_dir)
    leave_when_asked(run)
    lives_before = run.life()
    rank = int(os.environ.get("RANK", 0))
    terminal = _redirect_output(run, rank)
    try:
        config = configure.read_resolved(run.path)
        watchdog = Watchdog(config.watchdog, run, rank, int(os.environ.get("WORLD_SIZE", 1)))

        gc.disable()  # imports make what stays: to look for garbage among it takes a sixth of a rank's start
        import torch.distributed as dist

        from train.device import choose, require_one_format
        from train.extensions import choose_accelerator, prepare_deepspeed

        choose_accelerator()
        from train.loop import train
        from train.ranks import join
        from train.tracking.terminal import Terminal

        gc.freeze()
        gc.enable()

        speaker = Terminal(config.run.name, os.fdopen(terminal, "w"))
        prepare_deepspeed()  # nothing to do under `xc-train run`; srun and torchrun start ranks on machines that it never saw
        device = choose(config.train.precision, int(os.environ.get("LOCAL_RANK", 0)))
        if device.torch_device.type == "cpu":
            keep_freed_memory()
        ranks = join(device.backend)
        require_one_format(config.train.precision, list(zip(ranks.nodes(), ranks.gather(str(device.dtype)), strict=True)))
        ending = train(config, run, ranks, device, speaker, watchdog)
        ranks.barrier()
        watchdog.close()
        if rank == 0:
            run.write_outcome(ending.code, ending.reason, ending.step, ending.again)
            if TORCHRUN in os.environ:
                run.end_life(ending.code, ending.reason, ending.step)
        dist.destroy_process_group()
        return ending.code
    except (UserError, TryAgainError) as error:
        code, reason = error.exit_code, str(error)
    except OSError as error:
        code = EXIT_USER if error.errno in STORAGE_ERRORS else EXIT_CRASH
        reason = storage_reason(run, error) if code == EXIT_USER else repr(error)
        traceback.print_exc()
    except Exception as error:  # noqa: BLE001  whatever it was, the outcome must say so before the process goes
        code, reason = EXIT_CRASH, f"rank {rank}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]} (see {run.logs})"
        traceback.print_exc()
    # The first rank to fail knows why; the others only see it gone. One whose node was frozen may wake up in a later life: not its own.
    if not run.outcome.exists() and run.life() <= lives_before + 1:
        with suppress(OSError):
            run.write_outcome(code, reason, run.last_step())
    print(f"error: {reason}", file=sys.stderr, flush=True)
    # Other ranks may wait in a collective that this one will never join: leave at once, the launcher ends them.
    os._exit(code)


def storage_reason(run: RunDir, error: OSError) -> str:
    """What a file system refused, where, and the cure; not every file that a run needs is its own."""
    full, file = error.errno in (errno.ENOSPC, errno.EDQUOT), error.filename
    cure = "free space" if full else "make it writable"
    if file is None:  # what was written to was open already
        where = f"cannot write, into {run.path} or another folder of this run"
    elif Path(os.fsdecode(file)).resolve().is_relative_to(run.path.resolve()):
        where = f"cannot write in {run.path}"
    else:
        where = f"cannot {'write' if full else 'use'} {os.fsdecode(file)}"
        cure = "free space there" if full else "let this user read it, or write where it is to be written"
    return f"{where}: {error.strerror} ({cure} and run the same command: it goes on)"


def _redirect_output(run: RunDir, rank: int) -> int:
    """Sends what libraries print to the rank's log; returns a descriptor for the terminal (rank 0) or for the log."""
    log = os.open(run.logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    terminal = os.dup(1) if rank == 0 else os.dup(log)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return terminal


if __name__ == "__main__":
    main()

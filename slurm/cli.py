"""`xc-slurm`: from a config to a run on a cluster that heals itself, seen and stopped from a login node.

Invariant: user errors end in one line on stderr and exit code 2; no torch is imported.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.command_line import command_line, parse
from data_pipeline.errors import EXIT_DONE, UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(_parser(), argv, "overrides")
    sys.exit(command_line(lambda: _run(args)))


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except KeyboardInterrupt:
        if getattr(args, "watch", False) or getattr(args, "follow", False):  # how one leaves them
            return EXIT_DONE
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-slurm",
        description="Train on a Slurm cluster: one command submits a stage, and its job heals itself until the stage is finished.",
        epilog="A run: xc-slurm submit CONFIG; xc-slurm status RUN --watch; xc-slurm logs RUN -f.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    submit = commands.add_parser(
        "submit", help="check a stage, write its job script and submit it", description=_SUBMIT, formatter_class=_AS_WRITTEN
    )
    submit.add_argument("config", metavar="CONFIG", help="YAML of a stage; its slurm section says what the job asks for (slurm/config.py)")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, applied last")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the job script and ask sbatch whether it would take it; write nothing"
    )
    submit.set_defaults(run=_submit)

    chain = commands.add_parser("chain", help="submit stages as jobs in a row", description=_CHAIN, formatter_class=_AS_WRITTEN)
    chain.add_argument(
        "overrides", nargs="+", metavar="CONFIG | key=value", help="YAML files, a stage each, in order; then overrides for all"
    )
    chain.add_argument("--dry-run", action="store_true", help="print the job scripts and ask sbatch; write nothing")
    chain.set_defaults(run=_chain)

    array = commands.add_parser("array", help="prepare data as a job array", description=_ARRAY, formatter_class=_AS_WRITTEN)
    array.add_argument("--tasks", type=int, required=True, metavar="N", help="shares that the work is cut into")
    array.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="an option of sbatch: --sbatch=--partition=cpu; repeat it"
    )
    array.add_argument("--logs", type=Path, default=Path("slurm-logs"), metavar="FOLDER", help="where the logs go (default ./slurm-logs)")
    array.add_argument("--dry-run", action="store_true", help="print the script and ask sbatch; write nothing")
    array.add_argument("command", nargs="+", metavar="-- xc-data COMMAND ...", help="import, index or verify with its arguments")
    array.set_defaults(run=_array)

    status = commands.add_parser("status", help="what a run does, or all of yours", description=_STATUS)
    status.add_argument("run_dir", nargs="?", metavar="RUN", help="a run directory; without one, a line for each of your jobs in the queue")
    status.add_argument("--watch", action="store_true", help="again every few seconds, until the job has ended")
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="checkpoint, then end", description=_STOP)
    stop.add_argument("run_dir", metavar="RUN", help="a run directory")
    stop.set_defaults(run=_stop)

    logs = commands.add_parser("logs", help="what the job, or one of its ranks, said", description=_LOGS)
    logs.add_argument("run_dir", metavar="RUN", help="a run directory")
    logs.add_argument("--rank", type=int, metavar="R", help="of this rank; without it, what the job script and rank 0 said")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it is written")
    logs.set_defaults(run=_logs)
    return parser


_AS_WRITTEN = argparse.RawDescriptionHelpFormatter
_SUBMIT = """Refuses what cannot work, then freezes config and code in the run directory, beside job.sbatch, and submits that.
The job is requeued after a time limit, a preemption, a crash or a dead node, and goes on from its newest checkpoint.

  xc-slurm submit configs/pretrain_7b.yaml slurm.nodes=8 --dry-run
  xc-slurm submit configs/pretrain_7b.yaml slurm.nodes=8 slurm.partition=train"""

_CHAIN = """Each stage waits until the one before has finished, however many lives that takes; a stage that fails cancels those behind it.
A stage that is finished already is passed over, so the same command goes on after a mistake was mended.

  xc-slurm chain configs/pretrain_7b.yaml configs/sft_7b.yaml configs/compose_7b.yaml"""
_ARRAY = """Each task does its share (xc-data ... --task I/N). After an index, xc-data merge follows as a job once every task has succeeded.
A task whose node dies, or whose storage fails for a while, is requeued. Submitting it again is safe: what is whole is passed over.

  xc-slurm array --tasks 64 --sbatch=--partition=cpu --sbatch=--cpus-per-task=8 -- xc-data index SOURCE --tokenizer T --workers 8"""
_STATUS = """State, life, step, loss, speed, time left, last checkpoint, and why it waits: from squeue, else scontrol, else sacct, and from
the run directory."""
_STOP = """The run ends after its current step with a checkpoint, and its job is not requeued; a job that waits is taken out of the queue.
`touch RUN/stop` does so for a job that runs, for whoever may write there. The same xc-slurm submit goes on."""
_LOGS = "All lives are in one file, in order; each begins with a line that says when, where and in which job."


def _submit(args: argparse.Namespace) -> int:
    from slurm.submit import submit

    return submit(args.config, args.overrides, args.dry_run)


def _chain(args: argparse.Namespace) -> int:
    from slurm.submit import chain

    paths = [w for w in args.overrides if "=" not in w]
    if not paths:
        raise UserError("xc-slurm chain needs at least one CONFIG (the repository's own are in configs/)")
    return chain(paths, [w for w in args.overrides if "=" in w], args.dry_run)


def _array(args: argparse.Namespace) -> int:
    from slurm.array import array

    return array(args.command, args.tasks, args.sbatch, args.logs, args.dry_run)


def _status(args: argparse.Namespace) -> int:
    from slurm.status import status

    return status(args.run_dir, args.watch)


def _stop(args: argparse.Namespace) -> int:
    from slurm.status import stop

    return stop(args.run_dir)


def _logs(args: argparse.Namespace) -> int:
    from slurm.status import logs

    return logs(args.run_dir, args.rank, args.follow)


if __name__ == "__main__":
    main()

"""`xc-slurm`: from a config to a run on a cluster that heals itself, seen and stopped from a login node.

Invariant: user errors end in one line on stderr and exit code 2; no torch is imported.
"""

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.errors import EXIT_DONE, UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args, rest = _parser().parse_known_args(argv)
    if hasattr(args, "overrides"):  # argparse leaves what comes after an option
        args.overrides += [r for r in rest if not r.startswith("-")]
        rest = [r for r in rest if r.startswith("-")]
    if rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except (BrokenPipeError, KeyboardInterrupt):
        code = EXIT_DONE
    sys.exit(code)


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
    return parser


_AS_WRITTEN = argparse.RawDescriptionHelpFormatter
_SUBMIT = """Refuses what cannot work, then freezes config and code in the run directory, beside job.sbatch, and submits that.
The job is requeued after a time limit, a preemption, a crash or a dead node, and goes on from its newest checkpoint.

  xc-slurm submit configs/pretrain_7b.yaml slurm.nodes=16 --dry-run
  xc-slurm submit configs/pretrain_7b.yaml slurm.nodes=16 slurm.partition=train"""


def _submit(args: argparse.Namespace) -> int:
    from slurm.submit import submit

    return submit(args.config, args.overrides, args.dry_run)


if __name__ == "__main__":
    main()

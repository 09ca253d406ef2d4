"""`xc-slurm array`: data preparation as a job array over `--task I/N`, finished by the merge as a job that waits for it.

Invariant: submitting it again is safe: a task passes over what is whole, and the merge runs only once every task has succeeded.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import EXIT_DONE, UserError
from slurm import client
from slurm.script import directive_environment

COMMANDS = ("import", "index", "verify")
RETRIES = 3
"""How often a task is requeued after a failure that may pass; a dead node does not count."""


def array(command: Sequence[str], tasks: int, options: Sequence[str], logs: Path, dry_run: bool) -> int:
    """Submits the array, and for `index` the merge behind it; or prints the scripts.

    Args:
        command: `xc-data index SOURCE ...`, without `--task`.
        tasks: how many shares the work is cut into.
        options: of sbatch, for the array and for the merge.
        logs: folder of their logs.
        dry_run: print, write nothing.

    Raises:
        UserError: the command has no tasks, or sbatch refuses.
    """
    if len(command) < 3 or command[0] != "xc-data" or command[1] not in COMMANDS or "--task" in command:
        raise UserError(
            f"{shlex.join(command)!r} cannot be an array (give xc-data {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]} with its arguments, "
            "without --task, behind --)"
        )
    if command[2].startswith("-"):
        raise UserError(f"{shlex.join(command)!r}: {command[2]} comes too early (the source first, as the merge looks for it there)")
    if tasks < 1:
        raise UserError(f"--tasks {tasks} (give 1 or more)")
    for option in options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch {option!r} is no option (write --sbatch=--partition=cpu)")
    script = render(command, tasks, options, logs)
    if dry_run:
        print(script, end="", flush=True)
    said = client.test_only(script)
    if dry_run:
        print(f"sbatch would take it: {said}", file=sys.stderr)
        return EXIT_DONE
    logs.mkdir(parents=True, exist_ok=True)
    job = client.submit(script)
    print(f"submitted job {job}: {tasks} tasks of {shlex.join(command)}; logs in {logs}")
    if command[1] == "index":
        merge = client.submit(render_merge(command, options, logs), after=job)
        print(f"submitted job {merge}: xc-data merge, once every task has succeeded")
    print(f"next: squeue --job {job}; submit the same again if a task failed: what is whole is passed over")
    return EXIT_DONE


def render(command: Sequence[str], tasks: int, options: Sequence[str], logs: Path) -> str:
    """The script of one task."""
    own = [f"--job-name={' '.join(command[:2])}", f"--array=0-{tasks - 1}", "--requeue", "--open-mode=append"]
    log = str(logs.resolve() / f"{command[1]}-").replace("%", "%%") + "%A_%a.log"
    return (
        directive_environment()
        .get_template("array.sbatch.j2")
        .render(
            what=shlex.join(command).replace("\n", " "),
            options=[*own, f"--output={log}", *options],
            tasks=tasks,
            command=_as_python(command),
            retries=RETRIES,
        )
    )


def render_merge(command: Sequence[str], options: Sequence[str], logs: Path) -> str:
    """The script that merges what the tasks of `xc-data index` wrote."""
    source = command[2]
    at = [part for i, part in enumerate(command) if part.startswith("--index-dir") or (i and command[i - 1] == "--index-dir")]
    log = str(logs.resolve() / "merge-").replace("%", "%%") + "%j.log"
    lines = ["#!/bin/bash"]
    directive = directive_environment().filters["directive"]
    lines += [
        f"#SBATCH {directive(o)}" for o in ("--job-name=xc-data merge", "--requeue", "--open-mode=append", f"--output={log}", *options)
    ]
    return "\n".join([*lines, f"exec {_as_python(['xc-data', 'merge', source, *at])}", ""])


def _as_python(command: Sequence[str]) -> str:
    """`xc-data ...` under the Python that submits: a node's PATH may know another one, or none."""
    return shlex.join([sys.executable, "-m", "data_pipeline.cli", *command[1:]])

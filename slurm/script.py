"""Renders the job script: the one place where a config becomes shell.

Invariant: `render` is pure, and every value of the config arrives as data: quoted for sbatch in its directives, for bash in the body.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2

from slurm.client import COMMENT
from slurm.config import SlurmConfig


@dataclass(frozen=True)
class Place:
    """Where a job runs and with what."""

    run: Path
    """Run directory, absolute."""
    cwd: Path
    """Where relative paths of the config begin."""
    python: str
    """Interpreter that submits; decides in the job script, and runs the ranks where the config names no other."""


def directive_environment() -> jinja2.Environment:
    """Where the templates of this package are rendered: `sh` quotes for bash, `directive` for a line of sbatch."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # shell, not HTML: each value goes through `sh` or `directive`
    )
    environment.filters |= {"sh": shlex.quote, "directive": _directive}
    return environment


def render(name: str, config: SlurmConfig, place: Place, excluded: list[str], evaluate: bool) -> str:
    """The job script of a stage.

    Args:
        name: of the run; any text.
        config: the `slurm` section.
        place: paths.
        excluded: nodes that are not used.
        evaluate: whether the stage has held-out data that is measured after training.
    """
    container = [f"--container-image={config.container}"] if config.container else []
    if container:
        mounts = [*config.container_mounts, f"{place.run}:{place.run}"]
        container.append(f"--container-mounts={','.join(mounts)}")
    return (
        directive_environment()
        .get_template("job.sbatch.j2")
        .render(
            options=_options(name, config, place, excluded),
            run=str(place.run),
            python=config.python or place.python,
            judge=place.python,
            modules=config.modules,
            env=config.env,
            network=config.network.variables,
            setup=config.setup,
            preflight=config.preflight.enabled,
            preflight_seconds=config.preflight.timeout,
            step_options=_words(container),
            srun_options=_words(config.srun),
            tasks_per_node=config.tasks_per_node,
            evaluate=evaluate,
        )
    )


def _options(name: str, config: SlurmConfig, place: Place, excluded: list[str]) -> list[str]:
    """Options of sbatch, in the order in which an administrator looks for them."""
    optional = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "reservation": config.reservation,
        "constraint": config.constraint,
        "gpus-per-node": config.gpus_per_node or None,
        "cpus-per-task": config.cpus_per_rank,
        "mem": config.mem,
        "exclude": ",".join(excluded) or None,
    }
    return [
        f"--job-name={name}",
        f"--comment={COMMENT}{place.run}",
        f"--nodes={config.nodes}",
        f"--ntasks-per-node={config.tasks_per_node}",
        *(f"--{key}={value}" for key, value in optional.items() if value is not None),
        *(["--exclusive"] if config.exclusive else []),
        f"--time={config.time}",
        f"--signal=B:USR1@{config.warn}",
        "--requeue",
        "--open-mode=append",
        "--output=/dev/null",  # the script opens its own log
        f"--chdir={place.cwd}",
        *config.sbatch,
    ]


def _directive(option: str) -> str:
    """An option as sbatch reads it: its parser knows quotes and backslashes, and takes # for a comment outside quotes."""
    key, equals, value = option.partition("=")
    if not equals or shlex.quote(value) == value:
        return option
    return f'{key}="' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _words(options: list[str]) -> str:
    return "".join(f" {shlex.quote(option)}" for option in options)

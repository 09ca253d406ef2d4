"""`xc-slurm submit` and `chain`: checks, renders, freezes and submits stages.

Invariant: what cannot work is refused before anything is written, in one line that names the cure; no torch is needed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import jsonl
from data_pipeline.config import OVERHEAD
from data_pipeline.errors import EXIT_DONE, UserError
from slurm import client
from slurm import config as slurm_config
from slurm.config import SlurmConfig
from slurm.job_dir import JobDir
from slurm.script import Place, render
from train import configure
from train.config import Config
from train.run_dir import RunDir, in_use, read_json

SECRET = re.compile(r"(?i)(key|token(?!izer)|secret|passw)")
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs")
NAMES = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Planned:
    """A stage that can be submitted: checked, and rendered."""

    config: Config
    settings: SlurmConfig
    script: str
    job_dir: JobDir


def submit(path: str, overrides: Sequence[str], dry_run: bool) -> int:
    """Submits the stage of a config, or prints its job script.

    Raises:
        UserError: it cannot work, or sbatch refuses it.
    """
    stage = plan(path, overrides, dry_run)
    if not dry_run:
        _hand_over(stage)
        print(f"next: xc-slurm status {stage.config.run.dir} --watch")
    return EXIT_DONE


def chain(paths: Sequence[str], overrides: Sequence[str], dry_run: bool) -> int:
    """Submits stages as jobs in a row, each once the one before has finished; one that fails cancels those behind it.

    A stage that is finished already is passed over.

    Raises:
        UserError: one of them cannot work; then none was submitted.
    """
    stages: list[Planned] = []
    configs = [configure.load(path, overrides) for path in paths]
    dirs = [str(Path(config.run.dir).resolve()) for config in configs]
    if len(set(dirs)) < len(dirs):
        raise UserError(f"two stages share run.dir {next(d for d in dirs if dirs.count(d) > 1)} (give each its own)")
    for i, path in enumerate(paths):
        if finished(configs[i]):
            print(f"{dirs[i]}: finished before")
        else:
            stages.append(plan(path, overrides, dry_run, earlier=dirs[:i]))
    job = None
    for stage in [] if dry_run else stages:
        job = _hand_over(stage, after=job)
    if stages and not dry_run:
        print("next: xc-slurm status --watch")
    return EXIT_DONE


def plan(path: str, overrides: Sequence[str], dry_run: bool, earlier: Sequence[str] = ()) -> Planned:
    """Checks and renders a stage; writes nothing. A dry run also prints the script, before sbatch is asked.

    Args:
        path: the stage's YAML.
        overrides: `key=value`.
        dry_run: whether this is all.
        earlier: run directories of stages that will be finished before this one begins.

    Raises:
        UserError: it cannot work, or sbatch would refuse it.
    """
    config, settings = configure.load(path, overrides), slurm_config.load(path, list(overrides))
    place = Place(Path(config.run.dir).resolve(), Path.cwd(), sys.executable)
    check(config, settings, place, earlier)
    cordoned = {entry["node"]: entry["reason"] for entry in jsonl.read(settings.cordon_file)}
    nodes = client.node_names() or cordoned.keys()
    excluded = list(dict.fromkeys([*settings.exclude, *(node for node in cordoned if node in nodes)]))  # of a strange one sbatch takes none
    script = render(config.run.name, settings, place, excluded, evaluate=bool(configure.held_out(config)))
    for line in [
        *wasteful(config, settings),
        *(f"not used: {node}, {why} ({settings.cordon_file})" for node, why in cordoned.items() if node in nodes),
    ]:
        print(f"note: {line}", file=sys.stderr)
    if dry_run:
        print(script, end="", flush=True)
    else:
        require_free(config, JobDir(place.run))
    require_gpus(settings)
    estimate = client.test_only(script)
    if dry_run:
        print(f"sbatch would take it: {estimate}", file=sys.stderr)
    return Planned(config, settings, script, JobDir(place.run))


def _hand_over(stage: Planned, after: str | None = None) -> str:
    """Freezes and submits a stage; returns its job."""
    stage.job_dir.freeze(configure.to_yaml(stage.config), stage.script)
    stage.job_dir.run.stop_file.unlink(missing_ok=True)
    job = client.submit(stage.job_dir.script, after)
    stage.job_dir.write_job(job)
    waits = f", once job {after} has finished" if after else ""
    print(f"submitted job {job}: {stage.config.run.name}, {stage.settings.nodes} nodes, {stage.settings.world} ranks{waits}")
    return job


def check(config: Config, settings: SlurmConfig, place: Place, earlier: Sequence[str] = ()) -> None:
    """What can be known of a job without asking the cluster.

    Raises:
        UserError: what cannot work, and the cure.
    """
    _check_settings(settings)
    if re.search(r"[\n\r\\\":]" if not settings.container else r"[\n\r\\\":,]", str(place.run)):
        raise UserError(
            f"run.dir: {str(place.run)!r} has a character that Slurm or PYTHONPATH gives a meaning of its own (choose another name)"
        )
    if "\n" in config.run.name or not config.run.name:
        raise UserError("run.name must be one line (change it)")
    file_system = _file_system(place.run)
    if file_system in LOCAL_FILE_SYSTEMS:
        raise UserError(
            f"run.dir: {place.run} lies in the memory of this machine ({file_system}) (choose a file system that all nodes see)"
        )
    kinds = set()
    for name, source in config.data.sources.items():
        if "://" in source.path and not source.index_dir:
            raise UserError(f"data.sources.{name}: a remote source keeps its index in a local folder (name it: index_dir)")
        folder = place.cwd / (source.index_dir or source.path)
        if not (folder / "source.json").exists():
            raise UserError(f"data.sources.{name}: no source.json in {folder} (run xc-data index and xc-data merge, or mend the path)")
        kinds.add(read_json(folder / "source.json").get("kind"))
    for key, folder in configure.held_out(config).items():
        for name in ("source.json",) if key == "evaluate.text" else ("source.json", "candidates.json"):
            if not (place.cwd / folder / name).exists():
                raise UserError(f"{key}: no {name} in {place.cwd / folder} (mend the path)")
    needed = config.data.images.most_tokens + OVERHEAD
    if kinds - {"text"} and needed > config.data.context:
        raise UserError(
            f"data.context: {config.data.context} tokens do not hold the largest image of {needed} "
            f"(set data.context to {needed} at least, or make images smaller)"
        )
    if not (place.cwd / config.data.tokenizer / "tokenizer.json").exists():
        raise UserError(f"data.tokenizer: no tokenizer.json in {place.cwd / config.data.tokenizer} (mend the path)")
    if config.run.init_from and str((place.cwd / config.run.init_from).resolve()) not in earlier:
        folder = place.cwd / config.run.init_from
        if not any((folder / name).exists() for name in ("final/manifest.json", "config.json")):
            raise UserError(
                f"run.init_from: {config.run.init_from} is neither a finished run nor a folder of Hugging Face weights "
                "(wait for its job, submit both with xc-slurm chain, or mend the path)"
            )
    configure.require_same(config, place.run)


def finished(config: Config) -> bool:
    """Whether a run has its final weights and what was to be measured of them."""
    run = RunDir(config.run.dir)
    return (run.final / "manifest.json").exists() and (run.evaluation.exists() or not configure.held_out(config))


def require_free(config: Config, job_dir: JobDir) -> None:
    """Refuses a run that is finished, whose job has not ended, or in whose directory somebody trains without Slurm.

    Raises:
        UserError: which it is, and the way out.
    """
    path = job_dir.path
    if finished(config):
        raise UserError(f"{path} is finished (use its weights in {job_dir.run.final}, or choose another run.dir)")
    job = job_dir.job_id()
    found = client.find(job) if job else None
    if found and not found.ended:
        raise UserError(f"{path} is the run of job {job}, {found.state} (wait for it, or end it with xc-slurm stop {path})")
    if in_use(job_dir.run):
        raise UserError(f"{path} is in use by another process (wait for it, or touch {job_dir.run.stop_file})")


def require_gpus(settings: SlurmConfig) -> None:
    """Refuses more GPUs a node than the partition's nodes have.

    Raises:
        UserError: how many they have.
    """
    have = client.gpus_by_partition().get(settings.partition or "")
    if have is not None and settings.gpus_per_node > have:
        raise UserError(
            f"slurm.gpus_per_node: {settings.gpus_per_node}, but nodes of partition {settings.partition or '(default)'} have {have} "
            f"(set slurm.gpus_per_node={have}{', or 0 to train on CPUs' if not have else ' and more slurm.nodes'})"
        )


def wasteful(config: Config, settings: SlurmConfig) -> list[str]:
    """What works but leaves ranks or GPUs idle."""
    ranks = configure.data_parallel(config, settings.world)
    share = ranks * config.data.micro_packs
    lines = []
    if settings.tasks_per_node < settings.gpus_per_node:
        lines.append(
            f"slurm.ranks_per_node: {settings.tasks_per_node} ranks a node use {settings.tasks_per_node} of its "
            f"{settings.gpus_per_node} GPUs (leave it out: a rank a GPU)"
        )
    if rest := config.data.global_batch % share:
        lines.append(
            f"data.global_batch: {config.data.global_batch} packs do not divide by {ranks} ranks x {config.data.micro_packs}: "
            f"{share - rest} of {share} packs of the last micro-step are empty"
        )
    return lines


def _check_settings(settings: SlurmConfig) -> None:
    for key in ("nodes", "warn", "retries"):
        if getattr(settings, key) < 1:
            raise UserError(f"slurm.{key} is {getattr(settings, key)} (set it to 1 or more)")
    if settings.gpus_per_node < 0 or settings.tasks_per_node < 1:
        raise UserError("slurm.gpus_per_node and slurm.ranks_per_node count things (set them to 0 and 1 or more)")
    if 0 < settings.gpus_per_node < settings.tasks_per_node:
        raise UserError(
            f"slurm.ranks_per_node: {settings.tasks_per_node} ranks cannot share {settings.gpus_per_node} GPUs "
            "(leave it out for a rank a GPU, or raise slurm.gpus_per_node)"
        )
    try:
        limit = settings.time_s
    except ValueError:
        raise UserError(f"slurm.time: {settings.time!r} is no time limit (write 12:00:00, 2-00:00:00, or minutes)") from None
    if settings.warn >= limit:
        raise UserError(
            f"slurm.warn: {settings.warn} s leave nothing of slurm.time = {settings.time} (lower slurm.warn, or raise slurm.time)"
        )
    for name, value in settings.env.items():
        if not NAMES.fullmatch(name):
            raise UserError(f"slurm.env: {name!r} is no name of a variable (mend it)")
        if SECRET.search(name):
            raise UserError(f"slurm.env.{name}: a secret does not belong in a job script (export it in your shell: sbatch passes it on)")
        if "\n" in value:
            raise UserError(f"slurm.env.{name} has more than one line (use slurm.setup)")
    single = {key: value for key in vars(settings) if isinstance(value := getattr(settings, key), str)}
    listed = {key: item for key in ("exclude", "modules", "container_mounts", "sbatch", "srun") for item in getattr(settings, key)}
    for key, value in {**single, **listed}.items():
        if "\n" in value or "\r" in value:
            raise UserError(f"slurm.{key} has more than one line (mend it)")
    for option in settings.sbatch:
        if not option.startswith("-"):
            raise UserError(f"slurm.sbatch: {option!r} is no option (write --name=value)")


def _file_system(path: Path) -> str:
    """Type of the file system that holds a path, or will hold it; nothing where the system does not say."""
    while not path.exists():
        path = path.parent
    result = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(path)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    return result.stdout.strip()

"""Data prepared by a job array is what one process prepares, whatever dies on the way."""

import json
import shutil

import pytest
from slurm_runs import SlurmStage

from data_pipeline.errors import EXIT_USER


def index_in_array(stage: SlurmStage, cluster, source, demo, tmp_path, tasks=8):
    command = ["array", "--tasks", str(tasks), "--sbatch=--nodes=1", f"--logs={tmp_path / 'logs'}", "--"]
    made = stage.command(*command, "xc-data", "index", str(source), "--tokenizer", str(demo.tokenizer))
    assert made.returncode == 0, made.stderr
    return [line.split()[2].rstrip(":") for line in made.stdout.splitlines()[:2]]


def said(folder):
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.log")))


@pytest.fixture
def bare(demo, tmp_path):
    """The pairs of the demo without an index."""
    folder = tmp_path / "pair's shards"
    folder.mkdir()
    for tar in demo.source("pairs").glob("*.tar"):
        shutil.copy(tar, folder)
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("fault", [None, "crash"])
def test_an_array_indexes_and_merges_as_one_process_does(cluster, slurm_stage, demo, bare, tmp_path, fault):
    stage = slurm_stage(environment=cluster.environment)
    _, merge = index_in_array(stage, cluster, bare, demo, tmp_path)
    if fault:
        stage.wait(lambda: "RUNNING" in cluster.run("squeue", "-h", "-o", "%T"), 30, "a task")
        cluster.call("crash", "node01")
    try:
        assert stage.wait_for_end(cluster, merge, 240) == "COMPLETED", said(tmp_path / "logs")
    finally:
        if fault:
            cluster.call("boot", "node01")
            stage.wait(lambda: cluster.run("sinfo", "-h", "-p", "train", "-N", "-o", "%t").split().count("idle") == 4, 60, "the node")
    made, reference = (json.loads((folder / "source.json").read_text()) for folder in (bare, demo.source("pairs")))
    for source in (made, reference):
        source.pop("created", None)
    assert made == reference


@pytest.mark.parametrize("command", [["ls", "-l", "x"], ["xc-data", "stats", "x"], ["xc-data", "index", "x", "--task", "0/8"]])
def test_what_has_no_tasks_is_refused(cluster, slurm_stage, tmp_path, command):
    stage = slurm_stage(environment=cluster.environment)
    refused = stage.command("array", "--tasks", "8", f"--logs={tmp_path / 'logs'}", "--", *command)
    assert refused.returncode == EXIT_USER
    assert "cannot be an array" in refused.stderr
    assert not (tmp_path / "logs").exists()

"""`xc-slurm array`: what it refuses. That a node may die on the way is shown in test_healing.py."""

import pytest

from data_pipeline.errors import EXIT_USER


@pytest.mark.parametrize("command", [["ls", "-l", "x"], ["xc-data", "stats", "x"], ["xc-data", "index", "x", "--task", "0/8"]])
def test_what_has_no_tasks_is_refused(cluster, slurm_stage, tmp_path, command):
    stage = slurm_stage(environment=cluster.environment)
    refused = stage.command("array", "--tasks", "8", f"--logs={tmp_path / 'logs'}", "--", *command)
    assert refused.returncode == EXIT_USER
    assert "cannot be an array" in refused.stderr
    assert not (tmp_path / "logs").exists()


def test_the_source_comes_first_or_the_merge_would_not_find_it(cluster, slurm_stage, tmp_path):
    stage = slurm_stage(environment=cluster.environment)
    command = ["xc-data", "index", "--tokenizer", "t", "source"]
    refused = stage.command("array", "--tasks", "8", f"--logs={tmp_path / 'logs'}", "--", *command)
    assert refused.returncode == EXIT_USER and "--tokenizer comes too early" in refused.stderr
    assert not (tmp_path / "logs").exists()

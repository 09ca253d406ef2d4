"""A job that is disturbed ends in a finished run with nobody's help, and with the losses of a run that nothing disturbed, bitwise."""

import time

import pytest
from slurm_runs import Cluster, SlurmStage

from data_pipeline.errors import EXIT_DONE, EXIT_TRY_AGAIN
from slurm.job_dir import newest_checkpoint

STEPS = 60
LONG = {"train": {"steps": STEPS}, "checkpoint": {"every": 10}}


@pytest.fixture(scope="module")
def undisturbed(demo, tmp_path_factory, environment):
    """Losses of the same stage, trained on this machine without Slurm."""
    import yaml
    from stages import stage_settings

    folder = tmp_path_factory.mktemp("undisturbed")
    settings = stage_settings(demo, folder / "run")
    for section, changes in LONG.items():
        settings[section].update(changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    stage = SlurmStage(folder / "run.yaml", folder / "run", environment)
    stage.train_without_slurm()
    losses = stage.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


@pytest.fixture
def training(slurm_stage, cluster, environment):
    """A stage of 60 steps for two nodes of the cluster."""

    def make(name="run", **slurm):
        return slurm_stage(name, {**environment, **cluster.environment}, **LONG, slurm=slurm)

    return make


def finished(stage: SlurmStage, cluster: Cluster, job: str, undisturbed: dict[int, float], seconds: float = 600) -> None:
    assert stage.wait_for_end(cluster, job, seconds) == "COMPLETED", stage.log()
    assert stage.run.read_outcome()["code"] == EXIT_DONE
    assert stage.losses() == undisturbed


@pytest.mark.timeout(900)  # three lives; on a busy machine each takes minutes to import torch
def test_a_job_goes_on_after_a_warning_and_after_a_killed_rank_with_the_losses_of_an_undisturbed_run(training, cluster, undisturbed):
    stage = training(preflight={"slowest": 0.0})
    job = stage.submit()
    stage.wait_for_step(3)
    shown = stage.command("status", str(stage.path)).stdout
    assert f"{job} RUNNING on node" in shown
    assert "life 1" in shown
    assert "tokens/s" in shown
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what Slurm sends ahead of the time limit
    stage.wait(lambda: "requeued" in stage.log(), 120, "the requeue")
    stopped_at = stage.run.read_outcome()["step"]
    assert stage.run.read_outcome()["code"] == EXIT_TRY_AGAIN
    assert newest_checkpoint(stage.run) == stopped_at >= 3, "nothing is lost"
    stage.wait_for_step(min(STEPS - 10, stopped_at + 12))
    stage.kill_rank(1)
    finished(stage, cluster, job, undisturbed)

    assert len(stage.resumed_from()) == 3
    assert stage.resumed_from()[:2] == [None, stopped_at]
    assert stage.log().count("preflight node") == 6
    assert "all-reduce" in stage.log()
    rank_1 = stage.command("logs", str(stage.path), "--rank", "1").stdout
    assert rank_1.count(f"== job {job}, life") == 3, "a log keeps all lives"
    shown = stage.command("status", str(stage.path)).stdout
    assert f"{job} COMPLETED" in shown
    assert "(from scontrol)" in shown
    assert f"checkpoint step {STEPS}" in shown


@pytest.mark.soak
def test_a_run_that_fails_at_the_same_place_each_life_stops_with_a_code_of_its_own(training, cluster):
    stage = training(python="/bin/false", retries=2)
    job = stage.submit()
    assert stage.wait_for_end(cluster, job, 60) == "FAILED"
    assert "ExitCode=71:0" in cluster.run("scontrol", "show", "job", job)
    assert [line["event"] for line in stage.attempts()] == ["begin", "end"] * 2
    assert "2 lives in a row" in stage.run.read_outcome()["reason"]
    assert "71" in stage.command("status", str(stage.path)).stdout


@pytest.mark.soak
def test_the_time_limit_becomes_a_checkpoint_and_another_life(training, cluster, undisturbed):
    stage = training(time="2", warn=100)
    job = stage.submit("train.steps=2000")
    stage.wait(lambda: "requeued" in stage.log(), 200, "the time limit")
    assert newest_checkpoint(stage.run) == stage.run.read_outcome()["step"]
    stage.wait(lambda: len(stage.resumed_from()) == 2, 90, "the second life")
    assert stage.command("stop", str(stage.path)).returncode == 0
    losses = stage.losses()
    assert cluster.run("scontrol", "show", "job", job).count("Restarts=1")
    assert len(losses) == max(losses), "no step is missing"


@pytest.mark.soak
def test_ranks_that_do_not_hear_the_warning_are_ended_by_the_limit_and_the_job_comes_back(training, cluster, tmp_path):
    probe = tmp_path / "deaf"
    probe.write_text(
        f"""#!/bin/bash
trap '' USR2
if [ -n "$SLURM_RESTART_COUNT" ]; then mkdir -p {tmp_path}/run/final; echo '{{}}' >{tmp_path}/run/final/manifest.json; exit; fi
for i in $(seq 1000); do sleep 0.2; done
"""
    )
    probe.chmod(0o755)
    stage = training(python=str(probe), time="1", warn=20)
    assert stage.wait_for_end(cluster, stage.submit(), 150) == "COMPLETED", stage.log()
    assert len([a for a in stage.attempts() if a["event"] == "begin"]) == 2


@pytest.mark.soak
def test_stop_checkpoints_first_and_the_same_submit_goes_on(training, cluster, undisturbed):
    stage = training()
    stage.submit()
    stage.wait_for_step(3)
    assert stage.command("stop", str(stage.path)).returncode == 0
    step = stage.run.read_outcome()["step"]
    assert 3 <= step == newest_checkpoint(stage.run) < STEPS
    assert cluster.run("squeue", "--noheader") == ""
    finished(stage, cluster, stage.submit(), undisturbed)
    assert stage.resumed_from() == [None, step]


@pytest.mark.soak
@pytest.mark.parametrize("how", ["requeue", "cancel"])
def test_what_an_administrator_does_costs_at_most_the_steps_since_a_checkpoint(training, cluster, undisturbed, how):
    stage = training()
    job = stage.submit()
    stage.wait_for_step(13)
    cluster.run(*(["scontrol", "requeue"] if how == "requeue" else ["scancel"]), job)
    if how == "cancel":
        assert stage.wait_for_end(cluster, job) == "CANCELLED", "somebody wanted it gone: it does not come back"
        job = stage.submit()
    finished(stage, cluster, job, undisturbed)
    assert stage.resumed_from()[1] >= 10


@pytest.mark.soak
@pytest.mark.parametrize("position", [0, 1])
def test_a_node_without_power_costs_at_most_the_steps_since_a_checkpoint(training, cluster, undisturbed, position):
    stage = training()
    job = stage.submit()
    stage.wait_for_step(13)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")).split()
    died = time.time()
    cluster.call("crash", nodes[position])
    try:
        finished(stage, cluster, job, undisturbed)
    finally:
        cluster.call("boot", nodes[position])
        stage.wait(lambda: cluster.run("sinfo", "-h", "-p", "train", "-N", "-o", "%t").split().count("idle") == 4, 60, "the node")
    assert stage.resumed_from()[1] >= 10
    again = next(event["time"] for event in stage.run.events() if event["event"] == "start" and event["time"] > died)
    print(f"node {position} of the job died; training again after {again - died:.0f} s")


@pytest.mark.soak
def test_a_preempted_job_checkpoints_within_the_grace_time_and_comes_back(training, cluster, undisturbed):
    stage = training(partition="preempt")
    job = stage.submit()
    stage.wait_for_step(3)
    other = cluster.run("sbatch", "--parsable", "--partition=train", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    finished(stage, cluster, job, undisturbed)
    assert other
    assert stage.resumed_from()[1] >= 3


@pytest.mark.soak
def test_a_node_that_cannot_write_to_the_run_directory_is_excluded_and_the_job_goes_elsewhere(training, cluster, undisturbed, tmp_path):
    stage = training(preflight={"slowest": 0.0})
    (stage.path / "logs").mkdir(parents=True)
    (stage.path / "slurm").mkdir()
    cluster.call("readonly", "node02", str(stage.path))
    try:
        job = stage.submit()
        finished(stage, cluster, job, undisturbed)
    finally:
        cluster.call("writable", "node02", str(stage.path))
    assert "node02" in (tmp_path / "cordon.jsonl").read_text()
    assert "Read-only" in (tmp_path / "cordon.jsonl").read_text()
    assert "node02" not in cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N")
    dry = stage.command("submit", str(stage.config), "run.dir=" + str(tmp_path / "other"), "--dry-run")
    assert "--exclude=node02" in dry.stdout
    assert "Read-only" in dry.stderr

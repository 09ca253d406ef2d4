"""`xc-slurm submit`: refusals come before anything is written, and a job runs what was submitted, under the name that was given."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from slurm_runs import without_torch

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_TRY_AGAIN, EXIT_USER
from slurm import config as slurm_config
from slurm.cli import main
from slurm.job_dir import JobDir
from slurm.status import describe
from slurm.submit import wasteful
from train import configure
from train.run_dir import RunDir, own


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("slurm.node=2", "did you mean nodes?"),
        ("train.step=3", "did you mean steps?"),
        ("slurm.nodes=0", "slurm.nodes"),
        ("slurm.gpus_per_node=4; slurm.ranks_per_node=8", "slurm.ranks_per_node"),
        ("slurm.time=soon", "slurm.time"),
        ("slurm.warn=5000", "slurm.warn"),
        ("slurm.env={HF_TOKEN: x}", "slurm.env.HF_TOKEN"),
        ("slurm.env={TOKENIZERS_PARALLELISM: x, HF_TOKENS: y}", "slurm.env.HF_TOKENS"),
        ("slurm.env={a b: x}", "slurm.env"),
        ("slurm.sbatch=[rm]", "slurm.sbatch"),
        ("run.dir=/dev/shm/run", "run.dir"),
        ("run.dir=at-10:30", "run.dir"),
        ("run.init_from=/nowhere", "run.init_from"),
        ("data.context=2", "data.context"),
        ("data.images.policy=partition; data.images.most_tiles=100; model.projector.marks=true", "the largest image of 205"),
        ("data.tokenizer=/nowhere", "data.tokenizer"),
        ("data.sources.pairs.path=/nowhere", "data.sources.pairs"),
        ("data.sources.pairs.path=s3://bucket/pairs", "data.sources.pairs: a remote source keeps its index"),
        ("evaluate.splits={birds: /nowhere}", "evaluate.splits.birds: no source.json"),
        ("evaluate.text=/nowhere", "evaluate.text: no source.json"),
        ("slurm.gpus_per_node=9", "have 8"),
        ("slurm.nodes=17", "sbatch refuses the job"),
        ("slurm.partition=nowhere", "sbatch refuses the job"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_with_its_cure_and_nothing_is_written(
    cluster, slurm_stage, monkeypatch, capsys, override, says
):
    stage = slurm_stage()
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(stage.config), *override.split("; ")])
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert ended.value.code == EXIT_USER
    assert len(errors) == 1, errors
    assert says in errors[0]
    assert "(" in errors[0]
    assert not stage.path.exists()


@pytest.mark.parametrize(("ranks", "said"), [(None, []), (8, []), (2, ["slurm.ranks_per_node: 2 ranks a node use 2 of its 8 GPUs"])])
def test_gpus_without_a_rank_are_told(slurm_stage, ranks, said):
    stage = slurm_stage(slurm={"gpus_per_node": 8, "ranks_per_node": ranks}, data={"global_batch": 16})
    lines = wasteful(configure.load(stage.config), slurm_config.load(stage.config))
    assert [line.partition(" (")[0] for line in lines] == said


def test_status_shows_a_loss_that_is_not_finite(tmp_path):
    run = RunDir(tmp_path)
    line = {"step": 3, "life": 1, "time": 1.0, "progress": 0.25, "throughput/tokens_per_s": 10.0}
    jsonl.append(run.metrics, [{**line, "loss/train": 2.5}, {**line, "step": 4, "loss/train": None}])
    assert "step       4, 25.0%, loss nan, 10 tokens/s" in describe(JobDir(tmp_path))[0]


def test_a_dry_run_prints_the_script_asks_sbatch_writes_nothing_and_needs_no_torch(cluster, slurm_stage, tmp_path):
    stage = slurm_stage(
        environment={**cluster.environment, **without_torch(tmp_path / "login"), "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    )
    dry = stage.command("submit", str(stage.config), "data.global_batch=5", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("#!/bin/bash\n")
    assert "sbatch would take it" in dry.stderr
    assert "do not divide by 2 ranks" in dry.stderr
    assert not stage.path.exists()
    assert cluster.run("squeue", "--noheader") == ""


def test_a_cordoned_node_of_another_cluster_keeps_no_job_out(cluster, slurm_stage, tmp_path):
    stage = slurm_stage(environment=cluster.environment)
    nodes = ("of-another-cluster", "node03")
    jsonl.append(tmp_path / "cordon.jsonl", [{"node": node, "reason": "it burns", "job": "3"} for node in nodes])
    dry = stage.command("submit", str(stage.config), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "#SBATCH --exclude=node03\n" in dry.stdout
    assert [line.split(":")[1] for line in dry.stderr.splitlines() if "it burns" in line] == [" not used"]


def test_a_controller_that_is_away_is_no_end_of_a_job(cluster, slurm_stage, tmp_path):
    stage = slurm_stage(environment=cluster.environment, slurm={"sbatch": ["--hold"]})
    job = stage.submit()
    conf = Path(cluster.environment["SLURM_CONF"]).read_text().replace("MessageTimeout=10", "MessageTimeout=2")
    (tmp_path / "slurm.conf").write_text(re.sub(r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=9", conf))
    away = replace(stage, environment={**cluster.environment, "SLURM_CONF": str(tmp_path / "slurm.conf")})
    for command in (("status", str(stage.path)), ("status",), ("stop", str(stage.path)), ("submit", str(stage.config))):
        ended = away.command(*command)
        assert ended.returncode == EXIT_TRY_AGAIN, command
        assert ended.stderr.splitlines()[-1].startswith("error: squeue: ")
    assert not (stage.path / "stop").exists()
    cluster.run("scancel", job)


def test_a_name_is_only_a_name_and_the_job_runs_the_code_and_config_that_were_submitted(cluster, slurm_stage, tmp_path):
    name = "$(touch x); y \"z\" 'w' \\ #1 %j"
    # The ranks' Python is a script that tells what it was given: no training is needed to see what a job runs.
    probe = tmp_path / "probe's python"
    probe.write_text(
        f'#!/bin/bash\necho "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR ${{PYTHONPATH%%:*}} $MARK $*" >>"{tmp_path}/told"\n'
        f'until [ -e "{tmp_path}/seen" ]; do sleep 0.1; done; exit 2\n'
    )
    probe.chmod(0o755)
    mark = "`touch x`; $HOME 'q'"
    stage = slurm_stage(
        "run %j it's",
        cluster.environment,
        run={"name": name},
        slurm={"python": str(probe), "env": {"MARK": mark}, "ranks_per_node": 2, "retries": 1},
    )
    job = stage.submit()
    assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%j") == name
    again = stage.command("submit", str(stage.config))
    assert again.returncode == EXIT_USER
    assert "xc-slurm stop" in again.stderr
    (tmp_path / "seen").touch()
    assert stage.wait_for_end(cluster, job, 60) == "FAILED"
    told = sorted((tmp_path / "told").read_text().splitlines())
    assert [line.split()[0] for line in told] == ["0/4", "1/4", "2/4", "3/4"]
    assert [line.split()[1] for line in told] == ["0", "1", "0", "1"]
    (first,) = {line.split()[2] for line in told}
    assert first in cluster.run("scontrol", "show", "job", job)
    assert all(line.endswith(f"{stage.path}/code {mark} -m train.rank {stage.path}") for line in told)
    assert not list(tmp_path.rglob("x"))

    assert yaml.safe_load(stage.run.config.read_text())["run"]["name"] == name
    assert yaml.safe_load(stage.run.config.read_text())["slurm"]["env"] == {"MARK": mark}
    code = stage.path / "code"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "import train, slurm; print(train.__path__)"],
        env={"PYTHONPATH": str(code)},
        text=True,
        capture_output=True,
    )
    assert str(code) in ran.stdout
    about = json.loads((code / "commit.json").read_text())
    if shutil.which("git"):
        head = subprocess.run(["git", "-C", about["from"], "rev-parse", "HEAD"], text=True, capture_output=True)
        assert about["commit"] == (head.stdout.strip() or None)
    assert subprocess.run(["bash", "-n", str(stage.path / "job.sbatch")]).returncode == 0


def test_a_run_directory_of_another_config_is_refused(cluster, slurm_stage, tmp_path):
    stage = slurm_stage(environment=cluster.environment, slurm={"python": "/bin/false", "retries": 1})
    stage.wait_for_end(cluster, stage.submit())
    refused = stage.command("submit", str(stage.config), "train.lr=0.5")
    assert refused.returncode == EXIT_USER
    assert "train.lr differs" in refused.stderr


def test_a_run_directory_in_which_somebody_trains_without_slurm_is_refused_and_left_alone(cluster, slurm_stage):
    stage = slurm_stage(environment=cluster.environment)
    run = RunDir(stage.path)
    run.create()
    run.stop_file.touch()
    with own(run):
        refused = stage.command("submit", str(stage.config))
        assert refused.returncode == EXIT_USER
        assert "in use by another process" in refused.stderr
        assert run.stop_file.exists() and not run.config.exists()


def test_status_says_why_a_job_waits_and_until_when_and_stop_takes_it_out_of_the_queue(cluster, slurm_stage):
    stage = slurm_stage(environment=cluster.environment, slurm={"sbatch": ["--begin=now+3600"]})
    job = stage.submit()
    stage.wait(lambda: "BeginTime" in stage.command("status", str(stage.path)).stdout, 30, "the reason", every=1)
    shown = stage.command("status", str(stage.path)).stdout
    assert f"{job} PENDING" in shown
    assert "waits      BeginTime, not before a set time, as after a requeue, expected to start at 20" in shown
    assert stage.command("stop", str(stage.path)).returncode == 0
    assert "CANCELLED" in stage.command("status", str(stage.path)).stdout


def test_control_c_leaves_a_watch_and_interrupts_a_submission(monkeypatch, tmp_path, capsys):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.excepthook", None)  # put back behind the test
    monkeypatch.setattr("slurm.cli._status", interrupted)
    monkeypatch.setattr("slurm.cli._submit", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path), "--watch"])
    assert ended.value.code == 0 and not capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        main(["submit", "my.yaml"])
    assert capsys.readouterr().err == "interrupted\n"

"""When a job is requeued and when it stops, and which nodes preflight blames: decided by pure functions."""

import os
from dataclasses import replace

import pytest

import slurm.preflight
from data_pipeline import jsonl
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN, EXIT_USER
from slurm.config import PreflightConfig, SlurmConfig
from slurm.job_dir import JobDir
from slurm.life import EXIT_NO_PROGRESS, begin, end, evaluated, stalled
from slurm.preflight import EXIT_EXCLUDE, judge_blind, judge_report, problems
from train import preflight
from train.run_dir import write_json

NODES = ["node01", "node02", "node03", "node04"]
SETTINGS = SlurmConfig(gpus_per_node=8)


def begins(*checkpoints):
    """Lives that began from these checkpoints; some have no end, as when their node died."""
    lines = []
    for checkpoint in checkpoints:
        lines += [{"event": "begin", "checkpoint": checkpoint}, {"event": "end", "checkpoint": checkpoint}][: 1 + checkpoint % 2]
    return lines


@pytest.mark.parametrize(
    ("checkpoints", "newest", "count"),
    [
        ((), 0, 0),
        ((0,), 0, 1),
        ((0,), 5, 0),
        ((0, 0, 0), 0, 3),
        ((0, 0, 5, 5), 5, 2),
        ((0, 5, 5, 9), 12, 0),
        ((3, 9), 5, 0),
        ((0, 0, 9), 9, 1),
    ],
)
def test_lives_count_until_one_leaves_a_new_checkpoint(checkpoints, newest, count):
    assert stalled(begins(*checkpoints), newest) == count


@pytest.mark.parametrize("how", ["excluded", "taken"])
def test_a_life_that_excluded_a_node_or_was_preempted_does_not_count(how):
    lives = [{"event": event, "checkpoint": 0, "nodes": ["node01"]} for event in ("begin", how, "begin", "end")]
    assert stalled(lives, 0) == 1


def test_a_life_counts_whose_nodes_had_been_excluded_before_and_that_got_them_all_the_same():
    lives = [{"event": event, "checkpoint": 0, "nodes": ["node01"]} for event in ("begin", "excluded") * 3]
    assert stalled(lives, 0) == 2


@pytest.mark.parametrize(
    ("code", "by_slurm", "first", "second"),
    [
        (EXIT_DONE, False, "exit 0", "exit 0"),
        (EXIT_USER, False, "exit 2", "exit 2"),
        (EXIT_TRY_AGAIN, False, "requeue", f"exit {EXIT_NO_PROGRESS}"),
        (EXIT_CRASH, False, "requeue", f"exit {EXIT_NO_PROGRESS}"),
        (137, True, "requeue", "requeue"),
    ],
)
def test_an_evaluation_that_fails_is_tried_again_where_that_may_help_and_says_so_where_not(tmp_path, code, by_slurm, first, second):
    job_dir = JobDir(tmp_path)
    job_dir.folder.mkdir()
    job_dir.run.final.mkdir()
    write_json(job_dir.run.final / "manifest.json", {})
    for number, expected in enumerate((first, second)):
        assert begin(job_dir, replace(SETTINGS, retries=3), "7") == EXIT_DONE
        assert end(job_dir, SETTINGS, "7", 0, by_slurm=False) == "exit 0"
        verdict = evaluated(job_dir, replace(SETTINGS, retries=2), "7", code, by_slurm)
        assert verdict.startswith(expected), number
    outcome = job_dir.run.read_outcome()
    assert outcome["code"] == {"exit": int(second.split()[-1]) if second.startswith("exit") else 0}.get(second.split()[0], EXIT_DONE)
    assert ("the evaluation ended with code" in outcome["reason"]) == (outcome["code"] != EXIT_DONE)


def test_a_node_that_cannot_write_is_left_out_until_so_many_cannot_that_it_is_hardly_the_nodes(tmp_path, monkeypatch, capsys):
    settings = replace(SETTINGS, retries=2, exclude=["node09"], cordon=str(tmp_path / "new" / "cordon.jsonl"))
    codes = []
    for node in NODES[:3]:
        monkeypatch.setenv("SLURMD_NODENAME", node)
        codes.append(judge_blind(JobDir(tmp_path), settings, job="7"))
    assert codes == [EXIT_EXCLUDE, EXIT_EXCLUDE, EXIT_NEEDS_PERSON]
    assert capsys.readouterr().out.splitlines() == ["node09,node01 node09,node01", "node09,node01,node02 node09,node01,node02"]


def test_nodes_that_cannot_write_anything_are_left_out_as_often_as_slurm_remembers(tmp_path, monkeypatch):
    settings = replace(SETTINGS, retries=2, cordon=str(tmp_path / "new" / "cordon.jsonl"))
    monkeypatch.setattr(slurm.preflight.os, "access", lambda *_: False)
    monkeypatch.setattr(jsonl, "append", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    monkeypatch.setenv("SLURMD_NODENAME", "node01")
    codes = []
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        codes.append(judge_blind(JobDir(tmp_path), settings, job="7"))
    assert codes == [EXIT_EXCLUDE, EXIT_EXCLUDE, EXIT_NEEDS_PERSON]


def test_a_job_leaves_out_what_it_excluded_before_and_knows_what_other_jobs_noted(tmp_path, monkeypatch, capsys):
    settings = replace(SETTINGS, cordon=str(tmp_path / "cordon.jsonl"))
    jsonl.append(tmp_path / "cordon.jsonl", [{"node": "of-another-cluster", "reason": "x", "job": "3"}])
    job_dir = JobDir(tmp_path / "run")
    job_dir.folder.mkdir(parents=True)
    monkeypatch.setattr(slurm.preflight, "_job_nodes", lambda: NODES)
    for unfit in ("node03", "node02"):
        report = tmp_path / f"{unfit}.jsonl"
        jsonl.append(report, [{"node": node, **said} for node, said in measured().items() if node != unfit])
        assert judge_report(job_dir, settings, "7", report) == EXIT_EXCLUDE
        (tmp_path / "cordon.jsonl").write_text((tmp_path / "cordon.jsonl").read_text().splitlines()[0] + "\n")  # not kept
    assert capsys.readouterr().out.splitlines() == ["of-another-cluster,node03 node03", "of-another-cluster,node02,node03 node03,node02"]


def test_what_most_nodes_have_is_not_the_nodes_fault_and_none_is_excluded(tmp_path, monkeypatch, capsys):
    settings = replace(SETTINGS, cordon=str(tmp_path / "cordon.jsonl"))
    job_dir = JobDir(tmp_path / "run")
    job_dir.folder.mkdir(parents=True)
    monkeypatch.setattr(slurm.preflight, "_job_nodes", lambda: NODES)
    first, *others = NODES
    jsonl.append(tmp_path / "report.jsonl", [{"node": first, **measured()[first]}])
    assert judge_report(job_dir, settings, "7", tmp_path / "report.jsonl") == EXIT_NEEDS_PERSON
    assert not capsys.readouterr().out and not (tmp_path / "cordon.jsonl").exists()
    said = job_dir.run.read_outcome()
    assert said["code"] == EXIT_NEEDS_PERSON and all(f"{node}: " in said["reason"] for node in others)


def measured(**changes):
    """What four fit nodes say; keyword arguments change node03."""
    fit = {
        "versions": {"torch": "2.10"},
        "write": None,
        "gpus": 8,
        "gpu_problems": [],
        "tflops": 700.0,
        "all_reduce_ms": 3,
        "clock_skew": 0.0,
    }
    return {node: {**fit, **(changes if node == "node03" else {})} for node in NODES}


def test_fit_nodes_are_not_blamed():
    assert problems(measured(), NODES, SETTINGS) == {}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"versions": {"torch": "2.9"}}, "torch 2.9"),
        ({"write": "Read-only file system"}, "Read-only file system"),
        ({"gpus": 7}, "7 GPUs, not 8"),
        ({"gpu_problems": ["GPU 3: uncorrected ECC errors: 2"]}, "GPU 3: uncorrected ECC errors: 2"),
        ({"tflops": 300.0}, "300 TFLOPS, the median is 700"),
        ({"clock_skew": -60.0}, "clock is off by -60.0 s"),
    ],
)
def test_the_node_at_fault_is_named_with_the_reason_and_no_other(fault, says):
    found = problems(measured(**fault), NODES, SETTINGS)
    assert list(found) == ["node03"]
    assert says in found["node03"]


def test_a_node_that_hangs_is_blamed_and_not_those_that_wait_for_it():
    facts = {node: {**said, "absent": [2]} for node, said in measured().items()}
    facts["node03"] = {"versions": {"torch": "2.10"}, "write": None}
    assert problems(facts, NODES, SETTINGS) == {"node03": "did not finish measuring; did not come to the all-reduce"}
    facts["node03"] = {**measured()["node02"], "absent": [2]}
    assert problems(facts, NODES, SETTINGS) == {"node03": "did not come to the all-reduce"}
    assert problems({n: f for n, f in facts.items() if n != "node03"}, NODES, SETTINGS) == {"node03": "said nothing"}


def test_a_failed_sum_is_everybodys_where_no_node_is_at_fault():
    facts = {node: {**said, "all_reduce_problem": "timed out"} for node, said in measured().items()}
    assert set(problems(facts, NODES, SETTINGS)) == set(NODES)
    facts["node03"]["gpus"] = 7
    assert set(problems(facts, NODES, SETTINGS)) == {"node03"}


def spoken(*keys):
    """What a node has said that was ended then."""
    return {key: value for key, value in measured()["node01"].items() if key in keys}


def test_a_node_that_did_not_finish_measuring_is_not_fit():
    assert problems({"node01": spoken("versions", "write")}, NODES[:1], SETTINGS) == {"node01": "did not finish measuring"}


def test_nodes_that_hang_in_the_all_reduce_until_they_are_ended_are_not_fit():
    began = spoken("versions", "write", "gpus", "gpu_problems", "tflops")
    hung = "did not finish the all-reduce"
    assert problems(dict.fromkeys(NODES, began), NODES, SETTINGS) == dict.fromkeys(NODES, hung)
    facts = {node: {**began, "all_reduce_problem": "connection reset"} for node in NODES}
    assert problems({**facts, "node03": began}, NODES, SETTINGS) == {"node03": hung}
    facts = {**dict.fromkeys(NODES, began), "node03": {**began, "gpu_problems": ["GPU 3: uncorrected ECC errors: 2"]}}
    assert list(problems(facts, NODES, SETTINGS)) == ["node03"], "the one that may have made the others hang"


def test_the_first_node_is_blamed_for_its_own_crash_and_not_the_one_that_cannot_reach_it():
    facts = {"node01": spoken("versions", "write"), "node02": {**measured()["node02"], "all_reduce_problem": "timed out"}}
    del facts["node02"]["all_reduce_ms"], facts["node02"]["clock_skew"]
    assert problems(facts, NODES[:2], SETTINGS) == {"node01": "did not finish measuring"}


def test_a_driver_that_does_not_answer_is_reported_and_ends_no_preflight(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(preflight, "QUERY_S", 0.1)
    assert preflight._gpu_problems() == ["nvidia-smi did not answer in 0.1 s"]
    assert preflight._versions()["driver"] == "silent"


def test_a_rate_is_not_judged_where_the_limit_is_zero():
    lenient = replace(SETTINGS, preflight=PreflightConfig(slowest=0.0))
    assert problems(measured(tflops=1.0), NODES, lenient) == {}

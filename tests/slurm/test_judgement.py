"""When a job is requeued and when it stops, and which nodes preflight blames: decided by pure functions."""

from dataclasses import replace

import pytest

from slurm.config import PreflightConfig, SlurmConfig
from slurm.life import stalled
from slurm.preflight import problems

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
    [((), 0, 0), ((0,), 0, 1), ((0,), 5, 0), ((0, 0, 0), 0, 3), ((0, 0, 5, 5), 5, 2), ((0, 5, 5, 9), 12, 0), ((0, 0, 9), 9, 1)],
)
def test_lives_count_until_one_leaves_a_new_checkpoint(checkpoints, newest, count):
    assert stalled(begins(*checkpoints), newest) == count


def test_a_life_that_excluded_a_node_does_not_count():
    lives = [{"event": event, "checkpoint": 0} for event in ("begin", "excluded", "begin", "end")]
    assert stalled(lives, 0) == 1


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
    assert problems(facts, NODES, SETTINGS) == {"node03": "did not come to the all-reduce"}
    assert problems({n: f for n, f in facts.items() if n != "node03"}, NODES, SETTINGS) == {"node03": "said nothing"}


def test_a_failed_sum_is_everybodys_where_no_node_is_at_fault():
    facts = {node: {**said, "all_reduce_problem": "timed out"} for node, said in measured().items()}
    assert set(problems(facts, NODES, SETTINGS)) == set(NODES)
    facts["node03"]["gpus"] = 7
    assert set(problems(facts, NODES, SETTINGS)) == {"node03"}


def test_a_rate_is_not_judged_where_the_limit_is_zero():
    lenient = replace(SETTINGS, preflight=PreflightConfig(slowest=0.0))
    assert problems(measured(tflops=1.0), NODES, lenient) == {}

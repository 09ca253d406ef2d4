"""Stages in a row: the next begins once the one before has finished, and not at all if it fails.

The ranks' Python is a script here that finishes a stage, or does not: what is shown is Slurm's part, which no training changes.
"""

import pytest

from data_pipeline.errors import EXIT_USER

FINISH = "finish() { mkdir final; echo '{}' >final/manifest.json; }"


pytestmark = pytest.mark.soak


@pytest.fixture
def stages(slurm_stage, cluster, tmp_path):
    """Two stages, the second from the weights of the first; rank 0 of each runs the given lines of bash in its run directory."""

    def make(first: str, second: str):
        made = []
        for name, body in (("one", first), ("two", second)):
            probe = tmp_path / f"python-{name}"
            lines = ["#!/bin/bash", f"cd {tmp_path / name}", "[ $RANK = 0 ] || exit 0", FINISH, body, ""]
            probe.write_text("\n".join(lines))
            probe.chmod(0o755)
            init = {"init_from": str(tmp_path / "one")} if name == "two" else {}
            made.append(slurm_stage(name, cluster.environment, run=init, slurm={"python": str(probe), "retries": 2}))
        return made

    return make


def test_the_second_stage_begins_once_the_first_has_finished_even_in_its_second_life(stages, cluster):
    one, two = stages("[ -e again ] && finish || { touch again; exit 1; }", "[ -e ../one/final/manifest.json ] && finish")
    refused = two.command("submit", str(two.config))
    assert refused.returncode == EXIT_USER
    assert "xc-slurm chain" in refused.stderr
    chained = one.command("chain", str(one.config), str(two.config))
    assert chained.returncode == 0, chained.stderr
    first, second = (line.split()[2].rstrip(":") for line in chained.stdout.splitlines()[:2])
    assert "Dependency" in two.command("status", str(two.path)).stdout
    assert two.wait_for_end(cluster, second, 90) == "COMPLETED", two.log()
    assert one.wait_for_end(cluster, first, 10) == "COMPLETED"
    assert [a["event"] for a in one.attempts()] == ["begin", "end"] * 2
    again = one.command("chain", str(one.config), str(two.config))
    assert again.stdout.count("finished before") == 2


def test_a_stage_that_fails_cancels_what_depends_on_it(stages, cluster):
    one, two = stages("exit 1", "finish")
    chained = one.command("chain", str(one.config), str(two.config), "slurm.retries=1")
    second = chained.stdout.splitlines()[1].split()[2].rstrip(":")
    assert two.wait_for_end(cluster, second, 90) == "CANCELLED"
    assert not two.attempts()

"""A job that is disturbed ends in a finished run with nobody's help, and with the losses of a run that nothing disturbed, bitwise.

Slurm's part is shown with ranks that need no torch (tests/support/stand_in_rank.py), all faults side by side on one cluster; beside them
one training of two ranks is warned and then loses a node. `make soak` does every fault to trainings, at random moments and in random order:
SLURM_ROUNDS times (10), SLURM_SEED repeats an order.
"""

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

import pytest
import stand_in_rank
from slurm_faults import BACK_S, SCENARIOS, WATCHED, Scenario, power_cut, warning
from slurm_runs import NODES, Cluster, SlurmStage

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE
from slurm.job_dir import newest_checkpoint

STEPS, LONG, EVERY = 60, 120, 10
STAND_INS = [name for name in SCENARIOS if name not in ("warning", "other node without power", "other node frozen")]
ROUNDS, SEED = int(os.environ.get("SLURM_ROUNDS", "10")), int(os.environ.get("SLURM_SEED", random.randrange(10_000)))
TURNS = [(name, turn) for name in SCENARIOS for turn in range(ROUNDS)]
random.Random(SEED).shuffle(TURNS)
HOLDING = str(Path(__file__).parents[1] / "support" / "holding")
pytestmark = pytest.mark.timeout(900)  # a busy machine takes minutes to start a life


def shape(steps: int) -> dict[str, dict[str, object]]:
    return {"train": {"steps": steps}, "checkpoint": {"every": EVERY}}


def suffer(scenario: Scenario, stage: SlurmStage, cluster: Cluster, job: str, at: int) -> None:
    """Lets the fault happen once the step is done."""
    stage.wait_for_step(at)
    stage.notes |= {"lives": stage.begins(), "newest": newest_checkpoint(stage.run)}
    scenario.fault(cluster, stage, job)


def endure(scenario: Scenario, stage: SlurmStage, cluster: Cluster, at: int) -> SlurmStage:
    """Submits a stage, lets the fault happen once the step is done, and waits for the end."""
    if scenario.policy is not None:
        cluster.call("policy", scenario.policy)
    if scenario.prepare:
        scenario.prepare(cluster, stage)
    job = stage.notes["job"] = stage.submit()
    suffer(scenario, stage, cluster, job, at)
    (stage.path / "go").touch()
    stage.notes["state"] = stage.wait_for_end(cluster, job)
    return stage


def halted_power_cut(cluster: Cluster, stage: SlurmStage, job: str) -> None:
    """The second node's rank stops first: a fast machine would end the run while Slurm is asked for the node."""
    stage.signal_rank(1, "STOP")
    power_cut(1)(cluster, stage, job)


def finished(stage: SlurmStage, reference: dict[int, float], lossless: bool) -> None:
    """Done, in more lives than one, with the losses of the reference and no more lost than the steps since a checkpoint."""
    assert stage.notes["state"] == "COMPLETED", stage.log()
    assert stage.run.read_outcome()["code"] == EXIT_DONE
    assert stage.losses() == reference
    assert ", life 2, on " in stage.log(), "the fault passed it by"
    starts = [event for event in stage.run.events() if event["event"] == "start"]
    for start in starts[1:]:
        done = max((line["step"] for line in stage.metrics() if line["life"] < start["life"]), default=0)
        # A checkpoint is written beside the training: the newest may have been under way.
        least = done if lossless else max(0, (done - 1) // EVERY - 1) * EVERY
        assert (start["resumed_from"] or 0) >= least, f"life {start['life']} lost what was done before: {starts}"
    if len(starts) > 1:
        assert max(start["resumed_from"] or 0 for start in starts[1:]) >= stage.notes["newest"]


def way_back(stage: SlurmStage) -> str:
    """Seconds from the death of a node to training again: Slurm's, then the job's own."""
    died = stage.notes["died"]
    begin = next(line["time"] for line in stage.attempts() if line["event"] == "begin" and line["time"] > died)
    ranks = next(event["time"] for event in stage.run.events() if event["event"] == "start" and event["time"] > begin)
    step = next(line["time"] for line in stage.metrics() if line["time"] > ranks)
    own = f"{step - begin:.0f} s to its first step, {ranks - begin:.0f} of them to start the ranks and load the checkpoint"
    return f"{begin - died:.0f} s from the node's death to the next life, which are Slurm's; then {own}"


class Side:
    """Jobs side by side, a thread each."""

    def __init__(self, cluster: Cluster, make, folder: Path, stand_in: str) -> None:
        self._cluster, self._make, self._folder, self._python = cluster, make, folder, stand_in
        self._policy = Lock()

    def stage(self, name: str, environment: dict[str, str], sections: dict[str, object] | None = None, **slurm: object) -> SlurmStage:
        cordon = str(self._folder / f"{name}.jsonl")
        settings = {"python": self._python, "env": environment, "cordon": cordon, **slurm}
        sections = {**shape(STEPS), **WATCHED, **(sections or {}), "slurm": settings}
        return self._make(self._folder, name.replace(" ", "-"), self._cluster.environment, **sections)

    def endure(self, name: str) -> SlurmStage:
        scenario = SCENARIOS[name]
        stage = self.stage(name, {"STAND_IN_HOLDS_AT": "13"}, **scenario.slurm)
        if scenario.policy is None:
            return endure(scenario, stage, self._cluster, at=13)
        with self._policy:  # which is the whole site's
            return endure(scenario, stage, self._cluster, at=13)

    def fail(self) -> SlurmStage:
        """Each life fails at step 27."""
        stage = self.stage("same step", {"STAND_IN_FAILS_AT": "27"}, retries=2)
        stage.notes["job"] = stage.submit()
        stage.notes["state"] = stage.wait_for_end(self._cluster, stage.notes["job"])
        return stage

    def unheard(self) -> SlurmStage:
        """A life fails, and slurmctld takes no requeue."""
        deaf = ['scontrol() { [ "$1" != requeue ] && command scontrol "$@"; }', "sleep() { :; }"]
        stage = self.stage("unheard", {"STAND_IN_FAILS_AT": "27"}, setup=deaf)
        stage.notes["state"] = stage.wait_for_end(self._cluster, stage.submit())
        return stage

    def warned_early(self) -> SlurmStage:
        """Warned while the job script sets up."""
        begun, heard = self._folder / "set-up-began", self._folder / "was-warned"
        stage = self.stage("warned early", {}, setup=[f"touch {begun}", f"until [ -e {heard} ]; do sleep 0.1; done"])
        job = stage.submit()
        stage.wait(begun.exists, BACK_S, "the setup")
        self._cluster.run("scancel", "--signal=USR1", "--batch", job)
        stage.wait(lambda: "asked to stop" in stage.log(), BACK_S, "the warning")
        heard.touch()
        stage.notes["state"] = stage.wait_for_end(self._cluster, job)
        return stage

    def measure(self, held_out: Path) -> SlurmStage:
        """The evaluation behind the last step finds the storage away at first, and the second time something to mend."""
        python = self._folder / "python-that-measures"
        python.write_text(
            f"""#!/bin/bash
[ "$3" = evaluate ] || exec {self._python} "$@"
cd "$4"
if [ -e mended ]; then echo {{}} >evaluation.json; exit 0; fi
if [ -e asked ]; then exit 2; fi
touch asked; exit 75
"""
        )
        python.chmod(0o755)
        stage = self.stage("measured", {}, python=str(python), sections={"evaluate": {"splits": {"birds": str(held_out)}}})
        for state in ("first", "second"):
            stage.notes[state] = stage.wait_for_end(self._cluster, stage.submit())
            stage.notes[f"{state} said"] = stage.run.read_outcome()
            (stage.path / "mended").touch()
        return stage

    def train(self, environment: dict[str, str]) -> SlurmStage:
        """Real ranks: warned, then a node without power."""
        environment = {**environment, **self._cluster.environment}
        stage = self._make(self._folder, "training", environment, **shape(STEPS))
        job = stage.notes["job"] = stage.submit()
        suffer(Scenario(warning), stage, self._cluster, job, at=3)
        stage.notes["shown"] = stage.command("status", str(stage.path)).stdout
        suffer(Scenario(halted_power_cut), stage, self._cluster, job, at=min(STEPS - 20, newest_checkpoint(stage.run) + 12))
        stage.notes["state"] = stage.wait_for_end(self._cluster, job)
        return stage

    def plainly(self, environment: dict[str, str]) -> dict[int, float]:
        """Losses of the same training without Slurm."""
        stage = self._make(self._folder, "plain", environment, **shape(STEPS))
        stage.train_without_slurm()
        return stage.losses()

    def two_by_two(self, environment: dict[str, str]) -> tuple[SlurmStage, SlurmStage]:
        """Two ranks on each of two nodes, and as many without Slurm."""
        stage = self._make(self._folder, "two-by-two", {**environment, **self._cluster.environment}, slurm={"ranks_per_node": 2})
        stage.notes["state"] = stage.wait_for_end(self._cluster, stage.submit(), 600)
        plain = self._make(self._folder, "four", environment)
        plain.train_without_slurm(procs=4)
        return stage, plain

    def index(self, shards: Path, tokenizer: Path) -> tuple[Path, SlurmStage]:
        """The shards, in an array of eight tasks whose node dies."""
        bare = self._folder / "pair's shards"
        bare.mkdir()
        for tar in shards.glob("*.tar"):
            shutil.copy(tar, bare)
        stage, go = self.stage("array", {}), self._folder / "go"
        stage.environment = {**stage.environment, "PYTHONPATH": HOLDING, "HELD_UNTIL": str(go)}
        command = ["array", "--tasks", "8", "--sbatch=--nodes=1", f"--logs={self._folder / 'logs'}", "--"]
        made = stage.command(*command, "xc-data", "index", str(bare), "--tokenizer", str(tokenizer))
        assert made.returncode == 0, made.stderr
        tasks, merge = (line.split()[2].rstrip(":") for line in made.stdout.splitlines()[:2])
        stage.wait(lambda: bool(self._cluster.nodes_of(tasks)), BACK_S, "a task")
        node = self._cluster.nodes_of(tasks)[0]
        self._cluster.call("crash", node)
        go.touch()
        stage.notes |= {"state": stage.wait_for_end(self._cluster, merge), "tasks": tasks}
        self._cluster.call("boot", node)
        return bare, stage


@pytest.fixture(scope="module")
def disturbed(cluster, make_slurm_stage, stand_in, environment, demo, tmp_path_factory):
    """The faults, each upon a job of its own, and a training: what is still going on while the first tests look at what has ended."""
    side = Side(cluster, make_slurm_stage, tmp_path_factory.mktemp("disturbed"), stand_in)
    with ThreadPoolExecutor(len(STAND_INS) + 8) as pool:
        done = {"plain": pool.submit(side.plainly, environment)}
        for name in sorted(STAND_INS, key=lambda name: SCENARIOS[name].prepare is None):
            done[name] = pool.submit(side.endure, name)
            if SCENARIOS[name].prepare:  # it is to get the node that was made unfit for it: no other job may begin or end meanwhile
                wait([done[name]])
        done["same step"] = pool.submit(side.fail)
        done["unheard"] = pool.submit(side.unheard)
        done["warned early"] = pool.submit(side.warned_early)
        done["measured"] = pool.submit(side.measure, demo.source("heldout/unseen_concept/test"))
        done["training"] = pool.submit(side.train, environment)
        done["two by two"] = pool.submit(side.two_by_two, environment)
        done["array"] = pool.submit(side.index, demo.source("pairs"), demo.tokenizer)
        yield done
    cluster.call("policy")


@pytest.mark.parametrize("name", STAND_INS)
def test_a_job_heals_itself(disturbed, name):
    stage = disturbed[name].result()
    finished(stage, stand_in_rank.losses(STEPS), SCENARIOS[name].lossless)
    if "preemption" in name:
        assert "taken" in [line["event"] for line in stage.attempts()], "a preemption is held against the job"


@pytest.mark.parametrize(("name", "reason"), [("first node unfit", "cannot write the run directory"), ("other node unfit", "Read-only")])
def test_an_unfit_node_is_excluded_with_the_reason_and_no_later_job_uses_it(disturbed, name, reason):
    stage = disturbed[name].result()
    (entry,) = jsonl.read(stage.config.parent / f"{name}.jsonl")
    assert entry["node"] == stage.notes["unfit"]
    assert reason in entry["reason"]
    assert stage.resumed_from() == [None], "nothing was trained before"
    dry = stage.command("submit", str(stage.config), f"run.dir={stage.path}-2", "--dry-run")
    assert f"--exclude={entry['node']}" in dry.stdout
    assert reason in dry.stderr


def test_a_run_that_fails_at_the_same_step_each_life_stops_and_says_so(disturbed, cluster):
    stage = disturbed["same step"].result()
    assert stage.notes["state"] == "FAILED"
    assert "ExitCode=71:0" in cluster.run("scontrol", "show", "job", stage.notes["job"])
    assert stage.resumed_from() == [None, 20, 20], "the first life had made progress"
    said = stage.run.read_outcome()
    assert "2 lives in a row ended without a checkpoint after step 20" in said["reason"]
    assert "step 27 cannot be done" in said["reason"]
    assert "exit code 71" in stage.command("status", str(stage.path)).stdout
    assert said["step"] == 20


def test_a_job_that_slurm_does_not_requeue_fails_and_does_not_look_finished(disturbed):
    stage = disturbed["unheard"].result()
    assert stage.notes["state"] == "FAILED"
    assert "failed: scontrol requeue" in stage.log()
    assert stage.begins() == 1


def test_a_warning_that_comes_while_the_script_sets_up_is_heard(disturbed):
    stage = disturbed["warned early"].result()
    assert stage.notes["state"] == "COMPLETED", stage.log()
    assert "requeued: asked to stop before it trained" in stage.log()
    assert [line["event"] for line in stage.attempts()] == ["begin", "end"] * 2
    assert stage.resumed_from() == [None], "nothing was trained before"


def test_an_evaluation_is_tried_again_and_where_a_person_must_mend_it_the_same_submit_goes_on(disturbed):
    stage = disturbed["measured"].result()
    assert stage.notes["first"] == "FAILED", stage.log()
    assert [line.get("code") for line in stage.attempts()] == [None, 0, 75, None, 0, 2, None, 0]
    assert stage.notes["first said"]["code"] == 2
    assert "the evaluation ended with code 2" in stage.notes["first said"]["reason"]
    assert stage.notes["second"] == "COMPLETED", stage.log()
    assert stage.resumed_from() == [None], "trained once"
    assert "is finished" in stage.command("submit", str(stage.config)).stderr


def test_a_training_that_was_warned_and_lost_a_node_has_the_losses_of_one_without_slurm(disturbed):
    stage, plain = disturbed["training"].result(), disturbed["plain"].result()
    job, warned = stage.notes["job"], stage.attempts()[1]
    assert sorted(plain) == list(range(1, STEPS + 1))
    finished(stage, plain, lossless=False)
    assert stage.resumed_from()[1] == warned["checkpoint"] >= 3, "a warning costs nothing"
    rank_1 = stage.command("logs", str(stage.path), "--rank", "1").stdout
    assert rank_1.count(f"== job {job}, life") == 3, "a log keeps all lives"
    assert "life 2" in stage.notes["shown"]
    assert "tokens/s" in stage.notes["shown"]
    shown = stage.command("status", str(stage.path)).stdout
    assert f"{job} COMPLETED" in shown
    assert "(from scontrol)" in shown
    assert f"checkpoint step {STEPS}" in shown


def test_an_array_whose_node_dies_makes_the_index_that_one_process_makes(disturbed, cluster, demo):
    folder, stage = disturbed["array"].result()
    assert stage.notes["state"] == "COMPLETED"
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", stage.notes["tasks"]), "the fault passed it by"
    made, reference = (json.loads((f / "source.json").read_text()) for f in (folder, demo.source("pairs")))
    for source in (made, reference):
        source.pop("created", None)
    assert made == reference


@pytest.fixture(scope="module")
def undisturbed(make_slurm_stage, environment, tmp_path_factory):
    """Losses of a longer training, without Slurm."""
    stage = make_slurm_stage(tmp_path_factory.mktemp("undisturbed"), "run", environment, **shape(LONG))
    stage.train_without_slurm()
    return stage.losses()


@pytest.mark.soak
@pytest.mark.parametrize(("name", "turn"), TURNS, ids=[f"{name}-{turn}-seed{SEED}" for name, turn in TURNS])
def test_a_training_heals_itself_at_any_moment(slurm_stage, cluster, environment, undisturbed, name, turn):
    scenario = SCENARIOS[name]
    if scenario.prepare:  # behind a frozen node Slurm 22.05 passes over nodes that it calls idle: the job would never meet the unfit one
        cluster.anew()
    stage = slurm_stage("run", {**environment, **cluster.environment}, **shape(LONG), **WATCHED, slurm=dict(scenario.slurm))
    endure(scenario, stage, cluster, at=random.Random(f"{SEED} {name} {turn}").randrange(1, LONG // 2))
    stage.wait(lambda: len(cluster.idle()) == NODES, 60, "the nodes")
    finished(stage, undisturbed, scenario.lossless)
    if "died" in stage.notes:
        print(f"{name}: {way_back(stage)}")


def test_two_ranks_on_each_of_two_nodes_have_the_losses_of_four_without_slurm(disturbed):
    stage, plain = disturbed["two by two"].result()
    assert stage.notes["state"] == "COMPLETED", stage.log()
    assert len(plain.losses()) == 24
    assert stage.losses() == pytest.approx(plain.losses(), rel=1e-4)  # the sums over ranks have another order


@pytest.mark.soak
def test_stop_checkpoints_first_and_the_same_submit_goes_on(slurm_stage, cluster, environment, undisturbed):
    stage = slurm_stage("run", {**environment, **cluster.environment}, **shape(LONG))
    stage.submit()
    stage.wait_for_step(3)
    assert stage.command("stop", str(stage.path)).returncode == 0
    step = stage.run.read_outcome()["step"]
    assert 3 <= step == newest_checkpoint(stage.run) < LONG
    assert cluster.run("squeue", "--noheader") == ""
    assert stage.wait_for_end(cluster, stage.submit(), 600) == "COMPLETED", stage.log()
    assert stage.losses() == undisturbed
    assert stage.resumed_from() == [None, step]


@pytest.mark.soak
def test_a_job_that_was_cancelled_does_not_come_back_and_the_same_submit_goes_on(slurm_stage, cluster, environment, undisturbed):
    stage = slurm_stage("run", {**environment, **cluster.environment}, **shape(LONG))
    job = stage.submit()
    stage.wait_for_step(13)
    cluster.run("scancel", job)
    assert stage.wait_for_end(cluster, job) == "CANCELLED"
    assert stage.wait_for_end(cluster, stage.submit(), 600) == "COMPLETED", stage.log()
    assert stage.losses() == undisturbed
    assert stage.resumed_from()[1] >= 10


@pytest.mark.soak
def test_ranks_that_do_not_hear_the_warning_are_ended_by_the_limit_and_the_job_comes_back(slurm_stage, cluster, tmp_path):
    probe = tmp_path / "deaf"
    probe.write_text(
        f"""#!/bin/bash
trap '' USR2
if [ -n "$SLURM_RESTART_COUNT" ]; then mkdir -p {tmp_path}/run/final; echo '{{}}' >{tmp_path}/run/final/manifest.json; exit; fi
for i in $(seq 1000); do sleep 0.2; done
"""
    )
    probe.chmod(0o755)
    stage = slurm_stage("run", cluster.environment, slurm={"python": str(probe), "time": "1", "warn": 20})
    assert stage.wait_for_end(cluster, stage.submit(), 150) == "COMPLETED", stage.log()

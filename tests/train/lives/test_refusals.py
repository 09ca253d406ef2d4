"""What a user can mend is refused in one line that says what, where and the cure; exit 2; nothing is started and nothing lost."""

import errno
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE, EXIT_USER, UserError
from train import configure, launch
from train.cli import main
from train.rank import storage_reason
from train.run_dir import RunDir

JUMPING = str(Path(__file__).parents[2] / "support" / "jumping")


@pytest.fixture
def refused(capfd):
    """Runs `xc-train run`, or another command of it, in this process and returns its one line of complaint."""

    def run(config: Path, *overrides: str, command: str = "run") -> str:
        with pytest.raises(SystemExit) as ended:
            main([command, str(config), *overrides])
        errors = capfd.readouterr().err.strip()
        assert ended.value.code == EXIT_USER, errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ")
        assert re.search(r"\(.+\)$|: (use|run) ", errors), f"no cure: {errors}"
        return errors

    return run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", "train.stepz"),
        ("data.image.size=3", "images"),
        ("train.steps=many", "train.steps"),
        ("deepspeed.stage=4", "deepspeed.stage"),
        ("data.images.size=33", "data.images.size"),
        ("data.images.tokens=5", "data.images.tokens"),
        ("data.images.policy=partition", "model.projector.marks"),
        ("data.unit=epochs", "train.steps"),
        ("train.groups=[]", "train.groups"),
        ("train.warmup_steps=10", "train.warmup"),
        ("profile.steps=[3]", "profile.steps"),
        ("train.attention=flash", "train.attention"),  # in fp32
        ("checkpoint.keep_last=0", "keep_last"),
        *((f"{key}=0", key) for key in configure.AT_LEAST_1),
        ("model.plora.linears={wo: {rank: 0, alpha: 1}}", "model.plora.linears.wo.rank"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("guard.window=1", "guard"),
        ("guard={in_a_row: 0, then: rollback}", "guard.then"),
        ("deepspeed.offload.parameters=cpu", "deepspeed.offload.parameters"),
        ("deepspeed={stage: 3, offload: {optimizer: nvme, nvme_path: /tmp}}", "deepspeed.offload.optimizer: nvme"),
        ("deepspeed={stage: 3, extra: {zero_optimization: {offload_optimizer: {device: nvme}}}}", "deepspeed.offload.optimizer: nvme"),
        ("deepspeed={stage: 3, offload: {parameters: nvme}}", "deepspeed.offload.nvme_path"),
        ("deepspeed.zero_pp.quantized_weights=true", "deepspeed.zero_pp"),
        ("model.decoder.vocab=10", "model.decoder.vocab"),
        ("data.sources.pairs.weight=much", "data.sources.pairs.weight"),
        ("data.sources.pairs.path=/nowhere", "/nowhere"),
        ("data.tokenizer=/nowhere", "/nowhere"),
        ("run.init_from=/nowhere", "/nowhere"),
        ("evaluate.splits.x=/nowhere", "/nowhere"),
        ("evaluate.text=/nowhere", "evaluate.text: no such shard folder: /nowhere"),
    ],
)
def test_a_wrong_setting_names_its_key_and_starts_nothing(stage, refused, override, says):
    made = stage()
    assert says in refused(made.config, override)
    assert not made.run.path.exists()


def test_an_unknown_key_gets_the_nearest_known_one(stage, refused):
    assert "did you mean steps?" in refused(stage().config, "train.step=3")


def test_a_config_that_is_not_there_or_not_yaml_is_named(tmp_path, refused):
    assert "no such config" in refused(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    assert str(broken) in refused(broken)


def test_an_index_of_another_tokenizer_is_refused_with_the_command_that_mends_it(stage, demo, refused, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(demo.tokenizer, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert "run: xc-data index" in refused(stage().config, f"data.tokenizer={other}")


def test_a_run_directory_of_another_config_is_refused_and_left_alone(whole, refused):
    before = {p: p.read_bytes() for p in whole.run.path.rglob("*") if p.is_file()}
    assert "train.lr" in refused(whole.config, "train.lr=0.5")
    assert "data.context" in refused(whole.config, "data.context=96")
    assert {p: p.read_bytes() for p in whole.run.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("command", ["run", "prepare"])
def test_a_run_directory_that_another_holds_is_refused_and_keeps_the_config_that_its_next_life_reads(stage, refused, command):
    made = stage()
    with launch.made(configure.load(made.config, [])):
        before = made.run.config.read_bytes()
        assert "in use" in refused(made.config, "track.every=7", command=command)
        assert made.run.config.read_bytes() == before


def test_a_run_directory_that_another_config_took_since_the_stage_was_checked_is_refused(stage):
    made = stage()
    with launch.made(configure.load(made.config, ["train.lr=0.5"])):
        pass  # as hours ago, while an earlier stage of the same command trained
    with pytest.raises(UserError, match=r"belongs to another config: train\.lr differs"), launch.made(configure.load(made.config)):
        pass
    assert configure.read_resolved(made.run.path).train.lr == 0.5


def test_what_does_not_shape_the_result_may_change_and_a_finished_run_is_passed_over(whole, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["run", str(whole.config), "data.workers=1", "track.every=4", "checkpoint.every=7"])
    assert ended.value.code == EXIT_DONE
    assert "finished before" in capfd.readouterr().out
    assert whole.run.life() == 1


def test_two_stages_in_one_run_directory_are_refused(stage, capfd):
    made = stage()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(made.config), str(made.config)])
    assert ended.value.code == EXIT_USER
    assert "share run.dir" in capfd.readouterr().err
    again = stage("again", run={"dir": f"{made.run.path}/../{made.run.path.name}/"})
    with pytest.raises(SystemExit):
        main(["run", str(made.config), str(again.config)])
    assert "share run.dir" in capfd.readouterr().err, "one folder has many names"


def test_no_rank_is_none_to_train(stage, refused):
    for procs in ("0", "-1"):
        assert f"--procs {procs}: at least one" in refused(stage().config, "--procs", procs)


def test_a_chain_whose_stages_mean_different_things_by_their_weights_is_refused_before_its_first_stage_starts(stage, capfd):
    first = stage("first", model={"plora": {"rank": 4, "alpha": 8.0}})
    second = stage("second", run={"name": "second", "init_from": str(first.run.path)})
    with pytest.raises(SystemExit) as ended:
        main(["run", str(first.config), str(second.config)])
    assert ended.value.code == EXIT_USER
    said = "model.plora.alpha: test, which it begins from, has 8 at rank 4, not 4 at rank 4 (give both the same)"
    assert said in capfd.readouterr().err
    assert not first.run.path.exists()


@pytest.mark.parametrize(
    ("code", "file", "says"),
    [
        (errno.ENOSPC, "RUN/metrics.jsonl", "cannot write in RUN: No space left on device (free space and run"),
        (errno.EROFS, "RUN/metrics.jsonl", "cannot write in RUN: Read-only file system (make it writable and run"),
        (errno.EACCES, "/data/pairs/a.tar", "cannot use /data/pairs/a.tar: Permission denied (let this user read it, or"),
        (errno.EDQUOT, b"/dev/shm/slot", "cannot write /dev/shm/slot: Disk quota exceeded (free space there and run"),
        (errno.ENOSPC, None, "cannot write, into RUN or another folder of this run: No space left on device (free space and run"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_the_run_directory_only_where_it_lies_in_there(code, file, says, tmp_path):
    name = file.replace("RUN", str(tmp_path)) if isinstance(file, str) else file
    said = storage_reason(RunDir(tmp_path), OSError(code, os.strerror(code), name))
    assert said.startswith(says.replace("RUN", str(tmp_path)))
    assert said.endswith(" the same command: it goes on)")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(stage, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(small)], check=True)
    try:
        made = stage(run={"dir": str(small / "run")}, train={"steps": 12}, checkpoint={"every": 1, "keep_last": 100})
        made.run.__init__(small / "run")
        full = made.train()
        assert full.returncode == EXIT_USER, full.stderr
        lines = full.stderr.strip().splitlines()
        assert len(lines) == 1, full.stderr
        assert "cannot write checkpoint" in lines[0]
        assert "free space" in lines[0]
        complete = sorted(p.name for p in made.run.checkpoints.glob("step-*"))
        assert complete
        subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
        assert made.train().returncode == EXIT_DONE
        assert [e["resumed_from"] for e in made.run.events() if e["event"] == "start"][-1] == int(complete[-1][5:])
        assert not list(made.run.checkpoints.glob(".*partial"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a folder read-only")
def test_a_clock_that_jumps_metrics_that_vanish_and_a_run_directory_that_turns_read_only_lose_no_state(stage, whole, tmp_path_factory):
    made = stage()
    made.environment["PYTHONPATH"] = os.pathsep.join([JUMPING, os.environ.get("PYTHONPATH", "")])
    process = made.start()
    made.wait_for(2, process)
    made.run.metrics.unlink()
    os.kill(process.pid, signal.SIGALRM)
    for pid in made.rank_pids():
        os.kill(pid, signal.SIGALRM)
    made.wait_for(6, process)
    directory, aside = str(made.run.path), str(tmp_path_factory.mktemp("aside"))
    subprocess.run(["mount", "--bind", directory, aside], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", aside], check=True)  # where nobody writes: one that is written to is busy
    subprocess.run(["mount", "--bind", aside, directory], check=True)
    try:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == EXIT_USER, errors
        (line,) = errors.strip().splitlines()
        assert "cannot write" in line
        assert "writable" in line or "free space" in line
        again = made.train()
        assert again.returncode == EXIT_USER
        assert "run.dir: cannot write" in again.stderr
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
        subprocess.run(["umount", "-l", aside], check=True)
    assert made.train().returncode == EXIT_DONE
    lines = jsonl.read(made.run.metrics)
    assert lines[0]["step"] > 1, "what was removed is gone"
    losses = made.losses()
    assert losses == {step: loss for step, loss in whole.losses().items() if step in losses}
    assert max(losses) == 24
    assert made.weights() == whole.weights()

"""The job script: as reviewed, valid bash, and every value of the config only a value."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.config import Network, SlurmConfig, load
from slurm.script import Place, render

GOLDEN = Path(__file__).parent / "job.golden.sbatch"
PLACE = Place(Path("/shared/runs/it's 100% $HOME"), Path("/home/user/repo"), "/shared/venv/bin/python")
CONFIG = SlurmConfig(
    nodes=16,
    cpus_per_rank=14,
    partition="train",
    account="vlm",
    modules=["cuda/12.8"],
    env={"HF_HOME": "/shared/hf; rm -rf /"},
    setup=["ulimit -n 65536"],
    network=Network.infiniband,
    container="/shared/img.sqsh",
    container_mounts=["/data:/data"],
    sbatch=["--mail-type=END"],
    srun=["--cpu-bind=none"],
)


def bash_reads(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_the_script_is_the_one_that_was_reviewed_and_bash_can_read_it():
    script = render("$(touch x); y", CONFIG, PLACE, ["node07"], evaluate=True)
    bash_reads(script)
    assert script == GOLDEN.read_text(), f"review the change, then write it to {GOLDEN}"


TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=30)


@settings(max_examples=30)  # each starts bash
@given(name=TEXT, value=TEXT, folder=TEXT.filter(lambda t: "/" not in t), option=TEXT)
def test_no_value_can_become_shell(name, value, folder, option):
    place = Place(Path("/runs") / folder, Path("/work"), "/bin/python")
    config = SlurmConfig(env={"X": value}, modules=[value], srun=[option], python=value)
    script = render(name, config, place, [], evaluate=False)
    bash_reads(script)
    lines = script.splitlines()
    assert shlex.split(next(x for x in lines if x.startswith("export X="))) == ["export", f"X={value}"]
    assert shlex.split(next(x for x in lines if x.startswith("RUN="))) == [f"RUN={place.run}"]
    (srun,) = [x for x in lines if "-m train.rank" in x]
    assert f" {shlex.quote(option)} bash -c" in srun


@pytest.mark.parametrize(("written", "seconds"), [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-00", 172800), ("1-2:03:04", 93784)])
def test_a_time_limit_is_read_as_sbatch_reads_it(written, seconds):
    assert SlurmConfig(time=written).time_s == seconds


@pytest.mark.parametrize(
    ("written", "seconds"), [("24:00:00", 86400), ('"24:00:00"', 86400), ("1:30", 90), ("90", 5400), ("2-00:00:00", 172800)]
)
def test_a_time_limit_in_yaml_or_on_the_command_line_needs_no_quotes(tmp_path, written, seconds):
    """YAML 1.1 reads 24:00:00 as the number 86400, which as a time limit would be 60 days."""
    file = tmp_path / "stage.yaml"
    file.write_text(
        f"run: {{name: x, dir: y}}  # 画 é\nslurm:\n  time: {written}  # of one life\n  env: {{AT: {written}}}\n  exclude: [a, {written}]\n"
    )
    assert load(file).time_s == seconds
    assert load(file).env["AT"] == load(file).exclude[1] == written.strip('"')
    file.write_text("run: {name: x, dir: y}\n")
    assert load(file, [f"slurm.time={written}"]).time_s == seconds

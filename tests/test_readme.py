"""The README promises only what is there: its commands exist, its links lead somewhere, and CI runs its two commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import configure

TOP = Path(__file__).resolve().parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md")), *sorted((TOP / "examples").glob("*/README.md"))]
README = PAGES[0].read_text()
MODULES = {"xc-compose": "compose.cli", "xc-data": "data_pipeline.cli", "xc-slurm": "slurm.cli", "xc-train": "train.cli"}


def commands(page: str, program: str) -> set[str]:
    """Words that follow a program in indented lines and in code spans."""
    code = [line for line in page.splitlines() if line.startswith("    ")] + re.findall(r"`([^`]+)`", page)
    return {name for line in code for name in re.findall(rf"\b{program} ([a-z-]+)", line)}


def test_ci_runs_the_two_commands_of_the_readme():
    lines = (TOP / ".ci" / "run").read_text().splitlines()
    assert {"make demo", "make test"} <= set(lines)
    assert {"demo", "test"} <= commands(README, "make")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_make_target_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.M))
    assert commands(page.read_text(), "make") <= targets


@pytest.mark.parametrize("program", MODULES)
def test_every_command_that_is_named_exists_and_explains_itself(program):
    named = {name for page in PAGES for name in commands(page.read_text(), program)}
    assert named
    for name in named:
        shown = subprocess.run([sys.executable, "-m", MODULES[program], name, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0, f"{program} {name}: {shown.stderr}"
        assert len(shown.stdout) > 200


@pytest.mark.parametrize("page", [*PAGES, *TOP.glob("*/cli.py")], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_that_is_named_is_there_and_a_stage(page):
    for named in set(re.findall(r"\bconfigs/[\w/*\[\]-]+\.yaml", page.read_text())) - {"configs/NAME.yaml"}:
        found = sorted(TOP.glob(named))
        assert found, named
        for config in found:
            configure.load(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target

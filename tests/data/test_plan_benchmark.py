"""benchmarks/plan.py runs, and says what it found in one line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

from data_pipeline.errors import EXIT_DONE, EXIT_USER

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"
FIGURES = {"fill_vs_unbounded", "samples_per_s", "billion_window_ms", "billion_rss_gib", "balance_8", "balance_64"}


def test_the_benchmark_ends_with_its_figures_and_keeps_its_sources_where_it_is_told(tmp_path):
    ran = subprocess.run([sys.executable, SCRIPT, "--quick", "--dir", tmp_path], capture_output=True, text=True)
    assert ran.returncode == EXIT_DONE, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert set(result) == {"name", "figures", "versions"}
    assert result["name"] == "plan"
    assert set(result["figures"]) > FIGURES
    assert all(isinstance(value, float) and value > 0 for value in result["figures"].values())
    assert {"commit", "planner", "python", "numpy"} <= set(result["versions"])
    assert sorted(p.name.partition("-")[0] for p in tmp_path.iterdir()) == ["captions", "documents", "pairs"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location("plan_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10**9}))
    monkeypatch.setattr(sys, "argv", ["plan.py", "--dir", str(tmp_path / "large")])
    assert benchmark.main() == EXIT_USER
    error = capsys.readouterr().err
    assert "has no room for" in error
    assert "--dir" in error
    assert not list((tmp_path / "large").iterdir())

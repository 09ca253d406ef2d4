"""The benchmarks run from a clean tree and end with the line that others read; what they measure is never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_loader_benchmark_ends_with_its_figures_and_leaves_nothing_behind(tmp_path):
    """Without the peers' environment, as on a machine that has only the project."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); {NO_PEERS}", "--quick"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peers were not measured" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == {"name", "figures", "versions"}
    assert result["name"] == "loader"
    figures = result["figures"]
    assert {"of_decode_limit", "first_batch_s", "resume_extra_s", "worker_growth_mib"} <= {
        k for k, v in figures.items() if isinstance(v, float)
    }
    peers = {f"vs_{peer}" for peer in ("webdataset", "energon", "litdata", "mosaic")}
    assert {k for k, v in figures.items() if v is None} == peers | {f"{peer}_our_decoder" for peer in peers}
    assert all(least <= figures[name] <= most for name, (least, most) in figures["spread"].items())
    assert {"commit", "python", "torch", "simplejpeg", "processor", "cores"} <= result["versions"].keys()
    assert not list(tmp_path.iterdir())


def test_the_step_benchmark_compares_equal_losses_and_ends_with_its_figures(tmp_path):
    """It ends early where ours and the ordinary way disagree about the loss, also with a factor of the ordinary way taken out."""
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--quick", "--rounds", "1"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for factor in ("padding", "mask", "logits", "attention"):
        assert f"factor of its {factor}" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "step"
    asked = {"speedup_bf16", "speedup_fp32", "memory_ratio", "gemm_share_fp32", "gemm_share_bf16", "plora_overhead", "flat_32k"}
    assert asked <= {name for name, value in result["figures"].items() if isinstance(value, float)}


NO_PEERS = "import loader; from pathlib import Path; loader.PEERS_PYTHON = Path('/nonexistent'); loader.main()"


def environment(folder: Path) -> dict[str, str]:
    """Temporary files of our own go to the folder; torch's cache, which importing it opens, does not."""
    return {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder.with_name(f"{folder.name}-inductor"))}


def test_the_trainer_benchmark_ends_with_its_figures_and_leaves_nothing_behind(tmp_path):
    """One round of everything, at the demo's size."""
    command = [sys.executable, str(ROOT / "benchmarks" / "trainer.py"), "--quick", "--rounds", "1"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "trainer"
    figures = result["figures"]
    assert figures.keys() == {"overhead_mid", "overhead_demo_ms", "checkpoint_stall_share", "spread"}
    assert all(least <= figures[name] <= most for name, (least, most) in figures["spread"].items())
    assert {"torch", "deepspeed", "load"} <= result["versions"].keys()
    assert not list(tmp_path.iterdir())

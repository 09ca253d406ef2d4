"""`train.precision: auto` takes bf16 only where it is multiplied in hardware; each rank has a GPU of its own, or none starts."""

import pytest
import torch

from data_pipeline.errors import EXIT_USER, TryAgainError, UserError
from train import cli, device
from train.config import Precision


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx512f", "amx_bf16"}, torch.bfloat16), ({"avx2", "avx512_bf16"}, torch.bfloat16), ({"avx2", "avx512f"}, torch.float32)],
)
def test_auto_is_bf16_only_where_the_processor_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_cpuinfo", lambda field: [" ".join(flags)])
    assert device.choose(Precision.auto, 0).dtype is dtype
    assert device.choose(Precision.fp32, 0).dtype is torch.float32, "what is asked for is done"


def test_ranks_of_two_number_formats_are_refused_with_a_node_of_each():
    device.require_one_format(Precision.auto, [("a", "torch.float32"), ("b", "torch.float32")])
    found = [("a", "torch.float32"), ("b", "torch.bfloat16"), ("c", "torch.bfloat16")]
    with pytest.raises(UserError, match=r"^train\.precision: auto is bfloat16 on b and float32 on a \(set it to fp32 or bf16"):
        device.require_one_format(Precision.auto, found)


def test_a_rank_whose_gpus_are_gone_does_not_go_on_as_one_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "node07")
    with pytest.raises(TryAgainError, match=r"^node07: Slurm gave 8 GPUs and torch finds none \(see nvidia-smi there"):
        device.choose(Precision.auto, 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert device.choose(Precision.auto, 0).torch_device.type == "cpu"


def test_a_rank_without_a_gpu_on_a_machine_that_has_some_is_refused_in_one_line_with_a_cure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^3 ranks on a machine that shows 2 GPUs \(start 2: --procs, .*CUDA_VISIBLE_DEVICES\)$"):
        device.choose(Precision.auto, 2)


def test_more_ranks_than_gpus_are_refused_before_anything_is_started(stage, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(cli, "GPU_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = stage()
    with pytest.raises(SystemExit) as refused:
        cli.main(["run", str(made.config), "--procs", "3"])
    assert refused.value.code == EXIT_USER
    assert "3 ranks on a machine that shows 2 GPUs" in capfd.readouterr().err
    assert not made.run.path.exists()

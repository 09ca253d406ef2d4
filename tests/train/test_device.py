"""`train.precision: auto` takes bf16 only where it is multiplied in hardware."""

import pytest
import torch

from train import device
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

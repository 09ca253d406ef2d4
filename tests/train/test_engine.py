"""The typed settings become DeepSpeed's own, which DeepSpeed knows, and `extra` has the last word."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import get_timers_config
from hub_folders import stage_config

from data_pipeline.errors import UserError
from train.build import build_model
from train.config import Attention, Config, DeepSpeedConfig, GroupRule, OffloadConfig, OffloadTo, ZeroPPConfig
from train.device import Device
from train.engine import engine_json

ON_THIS_DEVICE = {"contiguous_gradients": False} if get_accelerator().device_name() == "cpu" else {}


def settings(**engine):
    config = Config(deepspeed=DeepSpeedConfig(**engine))
    return engine_json(config, world=4, micro_steps=2, dtype=torch.bfloat16, trainable=1000)


def test_by_default_nothing_is_offloaded_and_batches_are_counted_as_deepspeed_counts_them():
    made = settings()
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000} | ON_THIS_DEVICE
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (8, 2)
    assert made["data_types"]["grad_accum_dtype"] == made["communication_data_type"] == "fp32"
    assert settings(extra={"communication_data_type": "bf16"})["communication_data_type"] == "bf16"
    assert not get_timers_config(made).enabled, "it waits for the GPU twice a micro-batch"


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_offload_and_zero_pp_are_what_deepspeed_understands(device):
    offload = OffloadConfig(optimizer=OffloadTo.cpu, parameters=OffloadTo(device), nvme_path="/local/disk")
    made = settings(stage=3, offload=offload, zero_pp=ZeroPPConfig(8, quantized_weights=True, quantized_gradients=True))
    known = DeepSpeedZeroConfig(**made["zero_optimization"])
    assert (known.offload_optimizer.device, known.offload_param.device) == ("cpu", device)
    assert (str(known.offload_param.nvme_path) == "/local/disk") == (device == "nvme")
    assert known.offload_optimizer.pin_memory
    assert (known.zero_hpz_partition_size, known.zero_quantized_weights, known.zero_quantized_gradients) == (8, True, True)
    assert made["communication_data_type"] == "fp16", "the kernel that quantizes gradients takes any bits for fp16"


def test_trained_weights_stay_in_host_memory_where_frozen_ones_go_to_a_disk():
    """DeepSpeed 0.19.8 fails to load a checkpoint into trained weights of which more than `max_in_cpu` lie on one rank."""
    offload = OffloadConfig(optimizer=OffloadTo.cpu, parameters=OffloadTo.nvme, nvme_path="/local/disk")
    config = Config(deepspeed=DeepSpeedConfig(stage=3, offload=offload))
    made = engine_json(config, world=1, micro_steps=1, dtype=torch.bfloat16, trainable=7_000_000_000)
    assert DeepSpeedZeroConfig(**made["zero_optimization"]).offload_param.max_in_cpu == 7_000_000_000


def test_extra_overrides_one_key_of_a_section_and_leaves_the_others():
    made = settings(stage=1, extra={"zero_optimization": {"allgather_bucket_size": 7, "stage": 2}, "wall_clock_breakdown": True})
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 7} | ON_THIS_DEVICE
    assert made["wall_clock_breakdown"] is True


def test_a_life_has_the_attention_backend_that_is_set_or_does_not_begin():
    config = stage_config()
    config.train.groups = [GroupRule(".*")]
    cpu = Device(torch.device("cpu"), torch.bfloat16, "as configured")
    assert build_model(config, cpu).attention == "sdpa"
    config.train.attention = Attention.torch_varlen
    with pytest.raises(UserError, match=r"^train\.attention: torch_varlen needs a GPU"):
        build_model(config, cpu)

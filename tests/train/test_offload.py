"""Optimizer and weights outside the device train as those on it, and go on from their checkpoints."""

import pytest
from stages import Life, live_together

STAGE_3 = ("deepspeed.stage=3",)
OFFLOADED = {
    "optimizer": ((), ("deepspeed.offload.optimizer=cpu",)),
    "optimizer and weights": (STAGE_3, (*STAGE_3, "deepspeed.offload.optimizer=cpu", "deepspeed.offload.parameters=cpu")),
}


@pytest.mark.parametrize("what", OFFLOADED)
def test_a_run_whose_optimizer_or_weights_lie_in_host_memory_is_the_run_without(stage, what):
    here, there = stage("here", train={"steps": 4}), stage("there", train={"steps": 4}, checkpoint={"every": 2})
    live_together([Life(run, overrides) for run, overrides in zip((here, there), OFFLOADED[what], strict=True)])
    assert there.losses() == pytest.approx(here.losses(), abs=1e-5)
    there.forget_after(2)
    live_together([Life(there, OFFLOADED[what][1])])
    assert there.resumed_from() == [None, 2]
    assert there.losses() == pytest.approx(here.losses(), abs=1e-5)

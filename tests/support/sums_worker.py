"""One of two ranks that sum a gradient under every ZeRO stage in bf16, for test_zero.py: `sums_worker.py OUT.json`.

Rank 0 has gradients of 1, rank 1 of 2 ** -9, which is lost where their sum has bf16's eight bits. What comes out, by job, is what one
step of SGD with rate 1 made of fp32 masters that were 0.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from train.config import Config
from train.engine import Engine
from train.ranks import Ranks, join

GRADIENTS = (1.0, 2.0**-9)


class Products(nn.Module):
    """Its gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))

    def forward(self, batch: Tensor) -> Tensor:
        """The loss."""
        return (self.weight * batch).sum()


def moved(config: Config, ranks: Ranks) -> list[float]:
    """The masters after a step."""
    model = Products()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_scale": 1.0}], lr=0.0)
    engine = Engine(config, model, optimizer, ranks, torch.bfloat16)
    loss = engine.forward(torch.full((64,), GRADIENTS[ranks.rank], dtype=torch.bfloat16))
    engine.backward(loss, 1, last=True)
    engine.step(1.0)
    return safe_get_full_fp32_param(model.weight).tolist()


def main() -> None:
    (out_file,) = sys.argv[1:]
    ranks, results = join("gloo"), {}
    for stage in (1, 2, 3):
        for summed_in in ("by default", "bf16"):
            config = Config()
            config.data.global_batch, config.train.grad_clip, config.deepspeed.stage = 2, 1e9, stage
            if summed_in != "by default":
                config.deepspeed.extra = {"communication_data_type": summed_in}
            results[f"{stage} {summed_in}"] = moved(config, ranks)
    if ranks.rank == 0:
        Path(out_file).write_text(json.dumps(results))
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

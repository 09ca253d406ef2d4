"""One of two ranks that build a model under ZeRO-3, for test_weights_in.py: `parts_worker.py CONFIG.pt OUT.pt`.

What comes out of each rank: the bytes of parameters that it held whenever some were filled, and after all were; how often it read. Of
rank 0 also the weights, gathered by the engine that was made of the model.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train import optim
from train.build import build_model
from train.device import Device
from train.engine import Engine
from train.ranks import join
from train.weights.initial import Initial


def held(model: nn.Module) -> int:
    """Bytes of parameters in this rank's memory, its parts included."""
    parameters = [p for p in model.parameters() if p.device.type != "meta"]
    storages = [t.untyped_storage() for p in parameters for t in (p, getattr(p, "ds_tensor", p))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    config_file, out_file = sys.argv[1:]
    ranks = join("gloo")
    config = torch.load(config_file, weights_only=False)
    moments: list[int] = []
    fill = Initial.fill

    def watched(self: Initial, parameters: dict[str, nn.Parameter]) -> None:
        fill(self, parameters)
        moments.append(held(self._model))

    Initial.fill = watched
    built = build_model(config, Device(torch.device("cpu"), torch.float32, ""), ranks)
    found = {"filled": len(moments), "most": max(moments, default=0), "held": held(built.model)}
    engine = Engine(config, built.model, optim.adamw(built.trained, built.model, config.train), ranks, torch.float32)
    Path(f"{out_file}.{ranks.rank}.json").write_text(json.dumps(found))
    weights = engine.weights(keep=ranks.rank == 0)
    if ranks.rank == 0:
        torch.save(weights, out_file)
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

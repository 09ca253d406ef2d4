"""One of two ranks that train a tiny model under every ZeRO stage, for test_zero.py: `train_worker.py JOBS.pt OUT.pt`.

The job holds batches by step and pack; pack i belongs to rank i % 2.
What comes out: losses and norms of the gradient by step, weights at the end.
"""

import sys

import torch
import torch.distributed as dist

from train.config import Config
from train.engine import Engine
from train.model.xcomposer2 import XComposer2
from train.ranks import join


def optimizer_of(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """SGD shows parameters without AdamW's amplification of rounding; AdamW is what runs."""
    parameters = [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0, "weight_decay": 0.01}]
    return torch.optim.SGD(parameters, lr=0.0) if kind == "sgd" else torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98))


def build(config: Config) -> XComposer2:
    """The model with fresh weights; the decoder's base is frozen, as in pretraining."""
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    model.init_weights(config.run.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("decoder.") or "plora" in name)
    return model


def main() -> None:
    job_file, out_file = sys.argv[1:]
    ranks = join("gloo")
    jobs = torch.load(job_file, weights_only=False)
    results = {}
    for name, job in jobs.items():
        config = job["config"]
        model = build(config)
        engine = Engine(config, model, optimizer_of(model, job["optimizer"]), ranks, torch.float32)
        losses, norms = [], []
        for packs in job["steps"]:
            n_global = sum(p.supervised for p in packs)
            mine = torch.zeros(1, dtype=torch.float64)
            own = packs[ranks.rank :: ranks.world]
            for batch in own:
                loss_sum = engine.forward(batch).loss_sum
                engine.backward(loss_sum, n_global, last=batch is own[-1])
                mine += loss_sum.detach().double()
            engine.step(job["lr"])
            norms.append(engine.grad_norm())
            dist.all_reduce(mine)
            losses.append(mine.item() / max(1, n_global))
        results[name] = {"losses": losses, "norms": norms, "weights": engine.weights(keep=True)}
    if ranks.rank == 0:
        torch.save(results, out_file)
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

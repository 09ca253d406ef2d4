"""Which parameters move, how fast, and along which schedule.

Invariant: every parameter is decided by the first rule whose pattern matches its name; the learning rate is a pure function of the
run's progress and its steps, so that it needs no state in a checkpoint.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from data_pipeline.errors import UserError
from train.config import GroupRule, Schedule, TrainConfig

_BLOCK = re.compile(r"\bblocks\.(\d+)\.")
_MEASURED = re.compile(r"^projector\.feature_(mean|std)$")
"""What is measured once and never trains, whatever the rules say."""
_NO_DECAY = re.compile(r"(pos_embed|cls_token|reg_token)$")


@dataclass(frozen=True)
class Group:
    """Parameters that share learning rate and decay."""

    pattern: str
    lr_scale: float
    weight_decay: float
    names: list[str]
    count: int
    """Numbers in all tensors of the group."""


def resolve(model: nn.Module, config: TrainConfig) -> tuple[list[Group], list[Group]]:
    """Applies the rules: sets `requires_grad` and returns the trainable groups and, for the table, the frozen ones.

    The model may lie on the meta device, but not under ZeRO-3, which empties weights.

    Raises:
        UserError: a parameter that no rule matches, or nothing to train.
    """
    found: dict[tuple[str, float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    named = list(model.named_parameters())
    depth = 1 + max((int(m.group(1)) for name, _ in named if (m := _BLOCK.search(name))), default=-1)
    for name, parameter in named:
        rule = next((r for r in config.groups if re.search(r.match, name)), None)
        if rule is None:
            raise UserError(f"train.groups: no rule matches {name} (end the list with - {{match: .*, trainable: false}})")
        trainable = rule.trainable and not _MEASURED.search(name)
        parameter.requires_grad_(trainable)
        key = (rule.match, _lr_scale(rule, name, depth), _decay(rule, config, name, parameter), trainable)
        found.setdefault(key, []).append((name, parameter))
    groups = [
        (trainable, Group(pattern, scale, decay, [name for name, _ in members], sum(p.numel() for _, p in members)))
        for (pattern, scale, decay, trainable), members in found.items()
    ]
    trained = [g for trainable, g in groups if trainable]
    if not trained:
        raise UserError("train.groups: every parameter is frozen (set trainable: true in a rule)")
    return trained, [g for trainable, g in groups if not trainable]


def table(trained: Iterable[Group], frozen: Iterable[Group], lr: float) -> str:
    """The resolved groups as text, for the log."""
    rows = [("pattern", "tensors", "parameters", "peak lr", "decay")]
    rows += [(g.pattern, str(len(g.names)), f"{g.count:,}", f"{lr * g.lr_scale:.2e}", f"{g.weight_decay:g}") for g in trained]
    rows += [(g.pattern, str(len(g.names)), f"{g.count:,}", "frozen", "-") for g in frozen]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def highest_scales(groups: Iterable[Group]) -> dict[str, float]:
    """By rule, the largest factor on the learning rate: layer-wise decay gives one rule many."""
    found: dict[str, float] = {}
    for group in groups:
        found[group.pattern] = max(group.lr_scale, found.get(group.pattern, 0.0))
    return found


def adamw(groups: list[Group], model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the groups of a model, one kernel a tensor; `set_lr` gives each step its learning rate."""
    named = dict(model.named_parameters())
    settings = [{"params": [named[n] for n in g.names], "weight_decay": g.weight_decay, "lr": 0.0, "lr_scale": g.lr_scale} for g in groups]
    return torch.optim.AdamW(settings, lr=0.0, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the step's learning rate, scaled by group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(config: TrainConfig, progress: float, steps: float) -> float:
    """Linear warm-up, then `train.schedule`, at `progress` in 0..1 (paper: 1 % warm-up, cosine to 0), after so many steps.

    Callers pass the middle of the step, so that neither the first nor the last step is wasted at zero.
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    risen = min(1.0, steps / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * risen * _share(config, progress)


def _share(config: TrainConfig, progress: float) -> float:
    """Of the peak, by `train.schedule`."""
    if config.schedule is Schedule.constant:
        return 1.0
    if config.schedule is Schedule.wsd:
        share = min(1.0, max(0.0, 1 - progress) / max(1e-12, config.decay))
    else:
        done = min(1.0, (progress - config.warmup) / max(1e-12, 1 - config.warmup))
        share = 0.5 * (1 + math.cos(math.pi * done))
    return config.final_lr + (1 - config.final_lr) * share


def _lr_scale(rule: GroupRule, name: str, depth: int) -> float:
    """The rule's factor; with `layer_decay`, times decay ** blocks from the top (top block 1, embeddings depth + 1: BEiT's count)."""
    if rule.layer_decay == 1.0:
        return rule.lr_scale
    block = _BLOCK.search(name)
    return rule.lr_scale * rule.layer_decay ** (depth - int(block.group(1)) if block else depth + 1)


def _decay(rule: GroupRule, config: TrainConfig, name: str, parameter: nn.Parameter) -> float:
    if parameter.dim() <= 1 or _NO_DECAY.search(name):
        return 0.0
    return config.weight_decay if rule.weight_decay is None else rule.weight_decay

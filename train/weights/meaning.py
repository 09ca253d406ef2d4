"""Values of a `model` section that decide what weights mean and that no tensor's shape shows: heads, RoPE, PLoRA's scale, pixels.

Invariant: no torch, so that a chain of stages is compared before anything is started. A value that differs would be wrong in silence.
"""

import re
from typing import Any

from train.config import TrainConfig
from train.model_config import LowRank, LowRankMode, ModelConfig, RopeKind

LINEARS = ("wqkv", "wo", "w1", "w3", "w2")


def differences(theirs: ModelConfig, ours: ModelConfig, context: int, low_rank: bool) -> dict[str, str]:
    """What differs, by key of the config: "512, not 256".

    Args:
        theirs: of the stage that left the weights.
        ours: of the one that begins with them.
        context: tokens of our longest document; dynamic RoPE scaling shows beyond some length only.
        low_rank: theirs are low-rank weights that contribute; where they never moved from zero, scale and mode are free.
    """
    a, b = _values(theirs), _values(ours)
    found = {key: f"{a[key]}, not {b[key]}" for key in a if a[key] != b[key]}
    stretched = scaling_difference(*_scaling(theirs), ours, context)
    return found | ({"model.decoder.rope_scaling": stretched} if stretched else {}) | (_low_rank(theirs, ours) if low_rank else {})


def scaling_difference(kind: str, factor: float, positions: int, ours: ModelConfig, context: int) -> str | None:
    """How RoPE scaling of `kind` (linear, dynamic, or none under any name) differs from ours, with its cure; None where it does not.

    Ours may stretch what has none yet: that is how a context grows.
    """
    if kind not in ("none", "default", "linear", "dynamic"):
        return f"{kind}, which this decoder has not"
    before, now = _effect(kind, factor, positions, context), _effect(*_scaling(ours), context)
    if before in ("none", now):
        return None
    reach = f" model.decoder.max_positions={positions}" if kind == "dynamic" else ""
    return f"{before}, not {now} (set model.decoder.rope_scaling.kind={kind} model.decoder.rope_scaling.factor={factor:g}{reach})"


def trains_low_rank(model: ModelConfig, train: TrainConfig) -> bool:
    """Whether a stage moves low-rank weights."""
    parts = {"wqkv": "attention", "wo": "attention"}
    names = [f"decoder.layers.{i}.{parts.get(n, 'feed_forward')}.{n}.plora_b" for i in range(model.decoder.layers) for n in LINEARS]
    rules = (next((rule for rule in train.groups if re.search(rule.match, name)), None) for name in names)
    return model.plora.mode is not LowRankMode.none and any(rule is not None and rule.trainable for rule in rules)


def low_rank_of(model: ModelConfig, linear: str) -> LowRank:
    """Rank and alpha of a linear of the decoder."""
    return model.plora.linears.get(linear) or LowRank(model.plora.rank, model.plora.alpha)


def _values(model: ModelConfig) -> dict[str, Any]:
    """By key; what is drawn anew in each step (stochastic depth) is no part of it."""
    vision, decoder = model.vision, model.decoder
    return {
        "model.vision.name": vision.name,
        "model.vision.overrides": {k: v for k, v in vision.overrides.items() if not k.endswith("_rate")},
        "model.vision.mean": list(vision.mean),
        "model.vision.std": list(vision.std),
        "model.decoder.heads": decoder.heads,
        "model.decoder.kv_heads": decoder.kv_heads,
        "model.decoder.rms_eps": decoder.rms_eps,
        "model.decoder.rope_theta": decoder.rope_theta,
    }


def _low_rank(theirs: ModelConfig, ours: ModelConfig) -> dict[str, str]:
    """Mode, and alpha where the scale differs; where one of them has no low-rank weights, names of tensors tell."""
    was, now = theirs.plora, ours.plora
    if LowRankMode.none in (was.mode, now.mode):
        return {}
    found = {"model.plora.mode": f"{was.mode.value}, not {now.mode.value}"} if was.mode is not now.mode else {}
    for name in LINEARS:
        a, b = low_rank_of(theirs, name), low_rank_of(ours, name)
        if a.alpha / a.rank != b.alpha / b.rank:
            key = f"model.plora.linears.{name}.alpha" if name in {**was.linears, **now.linears} else "model.plora.alpha"
            found[key] = f"{a.alpha:g} at rank {a.rank}, not {b.alpha:g} at rank {b.rank}"
    return found


def _scaling(model: ModelConfig) -> tuple[str, float, int]:
    decoder = model.decoder
    return decoder.rope_scaling.kind.value, decoder.rope_scaling.factor, decoder.max_positions


def _effect(kind: str, factor: float, positions: int, context: int) -> str:
    """What scaling does to documents of up to `context` tokens, in words that are equal where the effects are."""
    if kind == RopeKind.linear.value and factor != 1:
        return f"linear by {factor:g}"
    if kind == RopeKind.dynamic.value and context > positions:
        return f"dynamic by {factor:g} beyond {positions} positions"
    return "none"

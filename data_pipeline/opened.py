"""Opens what a config's `data` section names, sources, tokenizer and plan, and refuses what cannot work.

Invariant: no torch. Whoever only checks a config (a launcher, a login node) waits for none.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Any

from data_pipeline.config import OVERHEAD, DataConfig, ImageConfig, ImageRule, as_plain
from data_pipeline.errors import UserError
from data_pipeline.plan.columns import Budgets, ImagePolicy
from data_pipeline.plan.origin import Origin
from data_pipeline.plan.partition import PartitionPolicy
from data_pipeline.plan.phases import Phase
from data_pipeline.plan.plan import Plan
from data_pipeline.read import budget
from data_pipeline.read.remote import Patience
from data_pipeline.shards.source import ShardSource
from data_pipeline.text import templates
from data_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """Everything that a config's `data` section names, opened and checked."""

    sources: list[ShardSource]
    tokenizer: Tokenizer
    plan: Plan


def open_data(config: DataConfig, seed: int, steps: int | None = None, origin: Origin | None = None) -> Data:
    """Opens sources and tokenizer and builds the plan.

    Args:
        config: the `data` section.
        seed: of the order.
        steps: length of the run, where it is given in steps; phases need it.
        origin: where the plan takes over from another one; the start of the run by default.

    Raises:
        UserError: a folder is missing, an index does not match, a value is out of its range, a budget cannot hold a sample or counts
            nothing.
        TryAgainError: the file system failed.
    """
    _check(config)
    if not config.sources:
        raise UserError("data.sources is empty (name at least one source: {NAME: {path: FOLDER}})")
    budget.check({name: source.errors for name, source in config.sources.items()})
    tokenizer = Tokenizer(config.tokenizer)
    patience = Patience(config.read_stall, config.read_deadline)
    sources = [
        ShardSource(name, source.path, source.index_dir, source.selection, patience=patience) for name, source in config.sources.items()
    ]
    for source in sources:
        source.require_tokenizer(tokenizer.digest)
    policy = image_policy(config.images)
    needed = policy.most_tokens + OVERHEAD
    if needed > config.context and any(s.images for s in sources):
        raise UserError(f"data.context: {config.context} tokens do not hold an image of {needed} (raise data.context)")
    try:
        plan = Plan(
            sources,
            [_weight(f"sources.{name}.weight", source.weight) for name, source in config.sources.items()],
            config.unit.value,
            Budgets(config.context, config.images_per_pack, config.segments_per_pack),
            policy,
            [OVERHEAD] * len(sources),
            config.window,
            config.global_batch,
            seed,
            extra_digest=f"{tokenizer.digest} {templates.VERSION} {_image_settings(config.images)}",
            later=_phases(config),
            steps=steps,
            origin=origin or Origin(),
        )
    except ValueError as error:
        raise UserError(f"data: {error} (mend the data section)") from None
    return Data(sources, tokenizer, plan)


def _check(config: DataConfig) -> None:
    """Refuses values with which nothing can be read."""
    images = config.images
    at_least = [
        ("micro_packs", config.micro_packs, 1),
        ("workers", config.workers, 0),
        ("prefetch", config.prefetch, 1 if config.workers else 0),
        ("images.size", images.size, 1),
        ("images.tokens", images.tokens, 1),
        ("images.jitter", images.jitter, 0),
    ]
    for key, value, least in at_least:
        if not value >= least:
            raise UserError(f"data.{key} is {value} (give at least {least})")
    if not 0 <= images.crop < 1:
        raise UserError(f"data.images.crop is {images.crop} (give the share of a side that may go: at least 0 and below 1)")


def image_policy(images: ImageConfig) -> ImagePolicy:
    """How the plan counts images.

    Raises:
        UserError: a partition that counts nothing.
    """
    if images.policy is ImageRule.square:
        return ImagePolicy(images.tokens)
    if isqrt(images.tokens) ** 2 != images.tokens:
        raise UserError(f"data.images.tokens: {images.tokens} tokens of a tile are no square (give (size / patch / merge) squared)")
    if images.most_tiles < 1:
        raise UserError(f"data.images.most_tiles is {images.most_tiles} (give at least 1)")
    return PartitionPolicy(images.tokens, images.size, images.most_tiles)


def _image_settings(images: ImageConfig) -> dict[str, Any]:
    """What of `data.images` shapes batches; squares have the digest that they had before there was a choice."""
    found = as_plain(images)
    return {k: v for k, v in found.items() if images.policy is not ImageRule.square or k not in ("policy", "most_tiles")}


def _phases(config: DataConfig) -> list[Phase]:
    """The phases after the first; each names what it changes."""
    weights, found = {name: source.weight for name, source in config.sources.items()}, []
    for i, phase in enumerate(config.phases):
        key = f"phases[{i}]"
        unknown = [name for name in phase.weights if name not in weights]
        if unknown:
            raise UserError(f"data.{key}.weights: no source {unknown[0]} (known: {', '.join(weights)})")
        weights = {**weights, **phase.weights}
        shares = tuple(_weight(f"{key}.weights.{name}", text) for name, text in weights.items())
        found.append(Phase(_number(f"{key}.at", phase.at), shares))
    return found


def _weight(key: str, text: str) -> Fraction:
    weight = _number(key, text)
    if weight < 0:
        raise UserError(f"data.{key}: {text} is negative (weights are shares; leave the source out instead)")
    return weight


def _number(key: str, text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"data.{key}: {text!r} is not a number (write a decimal such as 0.25)") from None

"""The config of a stage, read and checked: what no type can express is refused here, before any process is started."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from data_pipeline import configure
from data_pipeline.config import Change, ImageRule, MixUnit, as_plain
from data_pipeline.errors import UserError
from train.config import Attention, Config, DeepSpeedConfig, GuardThen, OffloadTo, Precision, Schedule
from train.run_dir import RunDir

CADENCE = ("workers", "prefetch", "change", "read_stall", "read_deadline", "cache_dir", "cache_gib")
"""Keys of `data` that shape no result."""
QUANTIZED = ("deepspeed.zero_pp.quantized_weights", "deepspeed.zero_pp.quantized_gradients")
"""Keys of `deepspeed` that shape the result, beside `extra`."""
MIX = ("sources", "unit", "phases", "global_batch", "window")
"""Keys of `data` that may change in the course of a run."""

AT_LEAST_1 = (
    *(f"model.decoder.{key}" for key in ("vocab", "hidden", "layers", "heads", "kv_heads", "ffn")),
    *("model.vision.patch", "model.projector.merge", "model.plora.rank", "track.every"),
)
"""Keys whose values are divided by, or counted up to."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of one stage; see `data_pipeline.configure.load`.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    config = configure.load(Config, path, overrides)
    _check(config, str(path))
    return config


def to_yaml(config: Config) -> str:
    """The resolved config: alone enough to repeat the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_resolved(run_dir: Path) -> Config:
    """The resolved config that a run directory holds.

    Raises:
        UserError: it holds none.
    """
    file = run_dir / "config.yaml"
    if not file.exists():
        raise UserError(f"{run_dir} is no run directory: no config.yaml in it (give the directory of run.dir)")
    return load(file)


def held_out(config: Config) -> dict[str, str]:
    """The folders of what is measured behind the last step, by the key that names each; none where nothing is."""
    text = {"evaluate.text": config.evaluate.text} if config.evaluate.text else {}
    return {f"evaluate.splits.{name}": folder for name, folder in config.evaluate.splits.items()} | text


def named_weights(config: Config) -> dict[str, str]:
    """The folders that the stage's first weights come from, by the key that names each; none where all are fresh.

    Raises:
        UserError: two of them would give the same weights.
    """
    parts = {"model.decoder.weights": config.model.decoder.weights, "model.vision.weights": config.model.vision.weights}
    given = {key: path for key, path in parts.items() if path}
    if config.run.init_from and given:
        raise UserError(f"run.init_from has all weights, and {' and '.join(given)} too (drop one: {next(iter(given))}=null)")
    return {"run.init_from": config.run.init_from} if config.run.init_from else given


def data_parallel(config: Config, world: int) -> int:
    """How many packs `world` ranks run at once: each sequence group is one of them.

    Raises:
        UserError: the ranks do not make whole groups.
    """
    groups, rest = divmod(world, config.parallel.sequence)
    if rest:
        raise UserError(
            f"parallel.sequence: {world} rank{'s' if world > 1 else ''} cannot be shared out into groups of {config.parallel.sequence} "
            "(use a multiple of it, or another parallel.sequence)"
        )
    return groups


def shaping_difference(ours: Config, theirs: Config) -> str | None:
    """The first key that shapes the result and differs; cadence, logging, workers, error budgets and the engine's stage may differ.

    So may the mix where `data.change` of `ours` says how to go on with another one.
    """
    a, b = as_plain(ours), as_plain(theirs)
    passed = CADENCE if ours.data.change is Change.refuse else CADENCE + MIX
    for path in ("run.stage", "run.seed", "run.init_from", "data", "model", "train", "deepspeed.extra", *QUANTIZED):
        found = _difference(_at(a, path), _at(b, path), path, passed)
        if found:
            return found
    return None


def require_same(config: Config, run_dir: Path) -> None:
    """Refuses a run directory whose results another config shaped.

    Raises:
        UserError: the first key that differs.
    """
    if RunDir(run_dir).config.exists():
        key = shaping_difference(config, read_resolved(run_dir))
        if key:
            others = ", or set data.change to go on with the new mix" if key.split(".")[1] in MIX else ""
            raise UserError(f"{run_dir} belongs to another config: {key} differs (choose another run.dir, or delete that one{others})")


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


def _difference(a: Any, b: Any, path: str, passed: tuple[str, ...]) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if (path == "data" and key in passed) or (path.startswith("data.sources.") and key == "errors"):
                continue
            if path == "train" and key in ("checkpointing", "attention"):  # memory for time: rounding at most
                continue
            if path == "train" and key == "precision" and Precision.auto.value in (a.get(key), b.get(key)):  # the checkpoint knows which
                continue
            found = _difference(a.get(key), b.get(key), f"{path}.{key}", passed)
            if found:
                return found
        return None
    return None if a == b else path


def _check(config: Config, where: str) -> None:
    """Contradictions that no type can express."""
    for name in ("run.name", "run.dir", "run.stage", "data.tokenizer", "data.global_batch", "train.lr"):
        section, _, key = name.partition(".")
        if getattr(getattr(config, section), key) == MISSING:
            raise UserError(f"{where}: {name} is missing (give it in the YAML or as {name}=VALUE)")
    for name in AT_LEAST_1:
        if _at(config, name) < 1:
            raise UserError(f"{where}: {name} must be at least 1 (raise it)")
    for name, own in config.model.plora.linears.items():
        if own.rank < 1:
            raise UserError(f"{where}: model.plora.linears.{name}.rank must be at least 1 (raise it)")
    betas = config.train.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{where}: train.betas: {betas} are not two numbers from 0 to below 1 (such as [0.9, 0.95])")
    images, cell = config.data.images, config.model.vision.patch * config.model.projector.merge
    if images.size % cell:
        raise UserError(
            f"{where}: data.images.size: {images.size} px is no multiple of patch x merge = {cell} px "
            f"(use {max(1, images.size // cell) * cell}, or change model.vision.patch or model.projector.merge)"
        )
    tokens = (images.size // cell) ** 2
    if tokens != images.tokens:
        raise UserError(
            f"{where}: data.images.tokens: an image of {images.size} px in cells of {cell} px makes {tokens} tokens, not {images.tokens} "
            f"(set data.images.tokens={tokens})"
        )
    if images.policy is ImageRule.partition and not config.model.projector.marks:
        raise UserError(f"{where}: data.images.policy: partition places a newline and a separator (set model.projector.marks=true)")
    decoder = config.model.decoder
    if decoder.hidden % decoder.heads or decoder.heads % decoder.kv_heads:
        raise UserError(f"{where}: model.decoder: heads must divide hidden, and kv_heads must divide heads (change one of them)")
    shared = config.parallel.sequence
    if shared < 1 or decoder.kv_heads % shared:
        raise UserError(
            f"{where}: parallel.sequence: {shared} ranks cannot share {decoder.kv_heads} key heads "
            f"(use a divisor of model.decoder.kv_heads, such as {math.gcd(max(shared, 1), decoder.kv_heads)})"
        )
    if (config.train.steps is None) == (config.data.unit is not MixUnit.epochs):
        raise UserError(f"{where}: the length must be given once: train.steps, or data.unit: epochs (set one of them)")
    if config.deepspeed.stage not in (0, 1, 2, 3):
        raise UserError(f"{where}: deepspeed.stage is {config.deepspeed.stage} (use 0, 1, 2 or 3)")
    _check_engine(config.deepspeed, where)
    if config.train.checkpointing.every < 1:
        raise UserError(f"{where}: train.checkpointing.every is {config.train.checkpointing.every} (use 1 or more)")
    if config.train.attention in (Attention.flash, Attention.torch_varlen) and config.train.precision is Precision.fp32:
        raise UserError(
            f"{where}: train.attention: {config.train.attention.value} knows no fp32 (set train.precision=bf16, or train.attention=auto)"
        )
    if config.train.compile and config.deepspeed.stage == 3:
        raise UserError(
            f"{where}: train.compile does not go with deepspeed.stage 3, whose hooks cut every graph (use stage 2, or do not compile)"
        )
    if config.data.global_batch < 1 or config.data.micro_packs < 1 or config.data.window < 1:
        raise UserError(f"{where}: data.global_batch, data.micro_packs and data.window must be at least 1 (raise them)")
    if config.train.warmup_steps < 0 or (config.train.warmup and config.train.warmup_steps):
        raise UserError(f"{where}: train.warmup and train.warmup_steps: give one, not negative (set the other to 0)")
    if config.train.schedule is Schedule.wsd and not 0 <= config.train.decay <= 1 - config.train.warmup:
        raise UserError(f"{where}: train.decay: {config.train.decay:g} does not fit between the warm-up and the end (lower it)")
    recorded = config.profile.steps
    if recorded and (len(recorded) != 2 or not 1 <= recorded[0] <= recorded[1]):
        raise UserError(f"{where}: profile.steps: {recorded} is no first and last step (such as [10, 15])")
    if config.evaluate.every < 0 or config.evaluate.captions < 0 or config.evaluate.pictures < 1:
        raise UserError(f"{where}: evaluate: every and captions must be 0 or more, pictures at least 1 (raise them)")
    if config.checkpoint.every < 1 or config.checkpoint.keep_last < 1 or config.checkpoint.keep_every < 0:
        raise UserError(f"{where}: checkpoint: every and keep_last must be at least 1, keep_every 0 or more (raise them)")
    if config.guard.in_a_row < 0 or config.guard.sigma < 0 or config.guard.window < 2:
        raise UserError(f"{where}: guard: in_a_row and sigma must be 0 or more, window 2 or more (change them)")
    if config.guard.then is GuardThen.rollback and not config.guard.in_a_row:
        raise UserError(f"{where}: guard.then: rollback never happens while guard.in_a_row is 0 (set it to 1 or more)")
    if not config.train.groups:
        raise UserError(f"{where}: train.groups is empty: nothing would be trained (begin with - {{match: .*}})")
    for i, rule in enumerate(config.train.groups):
        try:
            re.compile(rule.match)
        except re.error as error:
            raise UserError(f"{where}: train.groups[{i}].match: {rule.match!r} is no regular expression: {error} (mend it)") from None


def _check_engine(engine: DeepSpeedConfig, where: str) -> None:
    """What DeepSpeed would refuse on every rank, or pass over in silence."""
    offload, zero_pp = engine.offload, engine.zero_pp
    if offload.parameters is not OffloadTo.none and engine.stage != 3:
        raise UserError(f"{where}: deepspeed.offload.parameters needs ZeRO-3 (set deepspeed.stage=3)")
    if offload.optimizer is not OffloadTo.none and engine.stage < 1:
        raise UserError(f"{where}: deepspeed.offload.optimizer needs ZeRO (set deepspeed.stage to 1, 2 or 3)")
    if offload.optimizer is OffloadTo.nvme or _optimizer_of_extra(engine) == OffloadTo.nvme.value:
        raise UserError(
            f"{where}: deepspeed.offload.optimizer: nvme cannot go on from a checkpoint: DeepSpeed does not load its optimizer state "
            "(set deepspeed.offload.optimizer=cpu)"
        )
    if offload.parameters is OffloadTo.nvme and not offload.nvme_path:
        raise UserError(f"{where}: deepspeed.offload.parameters: nvme needs a folder (set deepspeed.offload.nvme_path)")
    if (zero_pp.partition_ranks > 1 or zero_pp.quantized_weights or zero_pp.quantized_gradients) and engine.stage != 3:
        raise UserError(f"{where}: deepspeed.zero_pp needs ZeRO-3 (set deepspeed.stage=3)")
    if zero_pp.partition_ranks < 1:
        raise UserError(f"{where}: deepspeed.zero_pp.partition_ranks is {zero_pp.partition_ranks} (use 1, or the GPUs of a node)")


def _optimizer_of_extra(engine: DeepSpeedConfig) -> Any:
    """Where `extra` puts the optimizer."""
    found: Any = engine.extra
    for key in ("zero_optimization", "offload_optimizer", "device"):
        found = found.get(key) if isinstance(found, dict) else None
    return found

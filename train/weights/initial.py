"""The weights that a stage starts from: fresh, a finished run's, or those of Hugging Face directories.

    run.init_from           a run, or a released InternLM-XComposer2: the whole model
    model.decoder.weights   InternLM2 or a Llama: the decoder and its head; PLoRA and the projector start fresh
    model.vision.weights    CLIP or DINOv2: the vision tower

Invariant: whether the folders fit is settled from headers before a process is started, and again by whoever loads; each tensor is read,
converted and placed before the next one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import UserError
from train import configure
from train.config import Config
from train.configure import named_weights
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir
from train.weights import clip, dinov2, exported, final, hub, internlm2, llama, meaning, official
from train.weights.hub import HubFolder
from train.weights.mapping import Entry, Row, Shapes, fits, load

SAMPLED = 64
"""Places of a file that its fingerprint reads."""
SAMPLE_BYTES = 1 << 14
TOWERS = {clip: "embeddings.class_embedding", dinov2: dinov2.CLASS}
"""Formats of a vision tower, and the tensor that gives each away."""
MEASURED = r"^features\.(mean|std)$"
"""What a tower's folder may hold whether or not features are standardised."""


@dataclass(frozen=True)
class Source:
    """A folder, and which of its tensors become which parameters."""

    key: str
    """Of the config, which names the folder."""
    folder: HubFolder
    entries: list[Entry]
    ignored: str
    differing: list[Row]
    """Values of its config.json, or of the stage that left it, that are not the model's."""


def check(config: Config) -> None:
    """Refuses weights that do not fit the model, before anything is started.

    Raises:
        UserError: a folder that holds no such weights, or a table of what does not fit.
    """
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    Initial(config, model)


def digest(config: Config) -> str | None:
    """What the stage's first weights are known by; None where all are fresh.

    A run's come from its manifest. Of a Hugging Face directory, names, sizes and samples spread over each file are hashed: a change of a
    few bytes between them goes unseen, and nobody waits for 15 GB.
    """
    found = [final.digest(path) if final.is_run(path) else fingerprint(Path(path)) for path in named_weights(config).values()]
    return hashlib.sha256("".join(found).encode()).hexdigest() if len(found) > 1 else next(iter(found), None)


class Initial:
    """The first value of every parameter: fresh from the seed, or loaded and converted to its format."""

    def __init__(self, config: Config, model: XComposer2) -> None:
        """`model` may be on the meta device.

        Raises:
            UserError: as `check`.
        """
        self._model, self._seed = model, config.run.seed
        self._sources = sources(config, model)
        for source in self._sources:
            fits(source.entries, source.folder, source.key, source.ignored, source.differing)
        self._loaded = {entry.ours for source in self._sources for entry in source.entries}

    def fill(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gives these parameters, named as in the model, their values."""
        for name, parameter in parameters.items():
            if name not in self._loaded:
                self._model.init_weight(name, parameter, self._seed)
        for source in self._sources:
            load([entry for entry in source.entries if entry.ours in parameters], source.folder, parameters)


def fill(model: XComposer2, config: Config) -> None:
    """Gives every parameter its first value.

    Raises:
        UserError: as `check`.
    """
    Initial(config, model).fill(dict(model.named_parameters()))


def sources(config: Config, model: XComposer2) -> list[Source]:
    """Where the weights come from that are not fresh; `model` may be on the meta device.

    Raises:
        UserError: a folder cannot be read, or is of another kind than its key asks for.
    """
    make = {"run.init_from": _whole, "model.decoder.weights": _decoder, "model.vision.weights": _vision}
    return [make[key](key, path, config, model) for key, path in named_weights(config).items()]


def _whole(key: str, path: str, config: Config, model: XComposer2) -> Source:
    shapes = model.shapes()
    if final.is_run(path):
        final.digest(path)
        folder, file = HubFolder(RunDir(path).final, key), RunDir(path).config
        differing = _differing_stage(configure.read_resolved(file.parent), config, folder, file.name) if file.exists() else []
        return Source(key, folder, final.entries(shapes), r"$^", differing)
    if not any((Path(path) / name).exists() for layout in hub.LAYOUTS for name in layout):
        raise UserError(f"{key}: {Path(path).resolve()} is neither a run nor a folder of Hugging Face weights (mend the path)")
    folder = HubFolder(path, key)
    if not any(name.startswith("vision_proj.") for name in folder.facts):
        raise UserError(f"{key}: {path} is no InternLM-XComposer2: no vision_proj in it (a language model goes to model.decoder.weights)")
    entries = official.entries(shapes, config.model.vision.name)
    if exported.is_export(folder.folder):
        differing = _differing_stage(exported.read(folder.folder), config, folder, exported.FILE)
    else:
        differing = _differing_decoder(folder.config, config)
    return Source(key, folder, entries, official.IGNORED, differing)


def _decoder(key: str, path: str, config: Config, model: XComposer2) -> Source:
    folder, shapes = HubFolder(path, key), model.shapes()
    differing = _differing_decoder(folder.config, config)
    if any(name.startswith("vision_proj.") for name in folder.facts):
        raise UserError(f"{key}: {path} is a whole InternLM-XComposer2 (give it as run.init_from)")
    if any(name.endswith(".attention.wqkv.weight") for name in folder.facts):
        return Source(key, folder, internlm2.entries(shapes), internlm2.IGNORED, differing)
    if any(name.endswith(".self_attn.q_proj.weight") and name.startswith("model.layers.") for name in folder.facts):
        tied = bool(folder.config.get("tie_word_embeddings", False))
        ignored = f"{internlm2.IGNORED}|{llama.TIED}" if tied else internlm2.IGNORED
        return Source(key, folder, llama.entries(shapes, config.model.decoder, tied), ignored, differing)
    raise UserError(f"{key}: {path} holds neither InternLM2 nor a Llama: no such tensor names (give another folder)")


def _vision(key: str, path: str, config: Config, model: XComposer2) -> Source:
    folder, name = HubFolder(path, key), config.model.vision.name
    found = next(((t, n.removesuffix(c)) for t, c in TOWERS.items() for n in folder.facts if n.endswith(c)), None)
    if found is None:
        raise UserError(
            f"{key}: {path} holds no vision tower of CLIP or DINOv2: neither {' nor '.join(TOWERS.values())} in it (give another folder)"
        )
    tower, prefix = found
    entries = [*tower.entries(model.shapes(), name, prefix), *_measured(model.shapes())]
    above = rf"{prefix}encoder\.layers?\.({'|'.join(map(str, range(len(model.vision.vit.blocks), 1 << 8)))})\."
    ours = {
        "hidden_act": "quick_gelu" if "quickgelu" in name else "gelu",
        "num_attention_heads": model.vision.vit.blocks[0].attn.num_heads,
    }
    theirs = folder.config.get("vision_config") or folder.config
    return Source(key, folder, entries, f"({tower.IGNORED})|(^{above})|{MEASURED}", _differing(theirs, ours))


def _measured(shapes: Shapes) -> list[Entry]:
    """What features are standardised by, where they are."""
    named = {f"projector.feature_{what}": f"features.{what}" for what in ("mean", "std")}
    return [Entry(ours, {theirs: shapes[ours]}) for ours, theirs in named.items() if ours in shapes]


def _differing_stage(theirs: Config, ours: Config, folder: HubFolder, file: str) -> list[Row]:
    """What the stage that left the weights meant by them and this one does not."""
    low_rank = any(bool(folder.read(name).any()) for name in folder.facts if name.endswith(("plora_b", "Plora_B.weight")))
    found = meaning.differences(theirs.model, ours.model, ours.data.context, low_rank)
    return [Row("wrong value", key, file, what) for key, what in found.items()]


def _differing_decoder(theirs: dict[str, Any], config: Config) -> list[Row]:
    """Values of a language model's config.json that shapes do not tell and that would be wrong in silence."""
    decoder = config.model.decoder
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    ours = {
        "hidden_act": "silu",
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.rms_eps,
        "rope_theta": decoder.rope_theta,
    }
    rows = _differing({"rope_theta": rope.get("rope_theta"), **theirs}, ours)
    kind, factor = rope.get("rope_type") or rope.get("type") or "default", float(rope.get("factor") or 1.0)
    positions = int(theirs.get("max_position_embeddings") or decoder.max_positions)
    stretched = meaning.scaling_difference(kind, factor, positions, config.model, config.data.context)
    return rows + ([Row("wrong value", "rope scaling", "config.json", stretched)] if stretched else [])


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[Row]:
    """Values of a config.json that are others than ours; what it does not say is taken to be right."""
    given = {k: theirs[k] for k in ours if theirs.get(k) is not None}
    return [Row("wrong value", k, "config.json", f"{v}, not {ours[k]}") for k, v in given.items() if not _same(v, ours[k])]


def _same(theirs: Any, ours: Any) -> bool:
    """Equal, as far as a number that was kept in fp32 can be."""
    if isinstance(theirs, (int, float)) and isinstance(ours, (int, float)):
        return isclose(theirs, ours, rel_tol=1e-6)
    return bool(theirs == ours)


def fingerprint(folder: Path) -> str:
    """What the weights of a Hugging Face directory are known by; see `digest`.

    Raises:
        UserError: it is not there.
    """
    digest = hashlib.sha256()
    if not folder.is_dir():
        raise UserError(f"no folder {folder.absolute()}, where the stage's first weights lie (put them back, or mend the path)")
    files: Sequence[Path] = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name.endswith(".index.json"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(SAMPLED):
                file.seek(max(0, size - SAMPLE_BYTES) * place // (SAMPLED - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

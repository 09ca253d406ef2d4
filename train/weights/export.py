"""`xc-train export`: a run as a Hugging Face directory with the official InternLM-XComposer2 names, config values, tokenizer and card.

Invariant: what is written is bitwise what the run holds; the folder appears whole, by one rename, and nothing is overwritten. Weights that
the stage froze are compared with those that it began from: a language model that was not to change did not.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import jsonl
from data_pipeline.errors import UserError
from data_pipeline.text.tokenizer import Tokenizer
from train import configure
from train.config import Config, Stage
from train.model.xcomposer2 import XComposer2
from train.model_config import DecoderConfig, RopeKind
from train.run_dir import RunDir, fsync_tree, read_json
from train.weights import card, claims, exported, final, hub, official
from train.weights.hub import HubFolder
from train.weights.mapping import Entry, fits

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
REPOSITORIES = {(True, 4096): "internlm/internlm-xcomposer2-7b", (False, 2048): "internlm/internlm-xcomposer2-vl-1_8b"}
"""Where the official modelling code lies, by whether the stage is composition, and width; for all others it is the VL-7B's."""
VL_7B = "internlm/internlm-xcomposer2-vl-7b"
KHD_7B = "internlm/internlm-xcomposer2-4khd-7b"
"""That of models with newline and separator."""
RELEASED_SCALING = {"factor": 1.0, "type": "dynamic"}
"""Changes nothing within `max_position_embeddings`."""


@dataclass(frozen=True)
class Weights:
    """What is exported."""

    step: int
    read: Callable[[str], Tensor]
    """A parameter by name, on the CPU."""
    dtypes: dict[str, torch.dtype]
    """Number formats of all parameters."""
    digest: str | None
    """Of final weights: ties held-out figures to them."""


def export(path: Path, out: Path) -> None:
    """Writes `out` from a run's final weights, or from one of its checkpoints, and says what engines should know.

    Raises:
        UserError: no such weights, weights without official names, frozen weights that moved, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists (give a folder that does not: nothing is overwritten)")
    run, folder = _find(path)
    config = configure.read_resolved(run.path)
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    entries = official.entries(model.shapes(), config.model.vision.name)
    weights = _checkpointed(folder, config, model) if folder else _final(run, model)
    code = _code_of_tokenizer(config)
    notes = [claims.unchanged(config, model, weights.read, weights.dtypes), *claims.engines(config), *_missing(code)]
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        said = _write_weights(partial, entries, weights)
        (partial / "config.json").write_text(json.dumps(_config_json(config, weights.dtypes["head.weight"]), indent=2))
        (partial / exported.FILE).write_text(exported.to_yaml(config))
        _copy_tokenizer(config, code, partial)
        (partial / "README.md").write_text(_card(run, config, weights, notes))
        fsync_tree(partial)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error.strerror} (free space, or choose another folder)") from None
    print("\n".join([f"{out}: {said}, from step {weights.step} of {run.path}", *notes]))


def _find(path: Path) -> tuple[RunDir, Path | None]:
    """The run, and the checkpoint where one is meant."""
    if path.resolve().parent.name == "checkpoints":
        return RunDir(path.resolve().parents[1]), path.resolve()
    run = RunDir(path)
    if not (run.final / final.MANIFEST).exists():
        newest = max(run.checkpoints.glob("step-*"), default=None)
        cure = f"export a checkpoint: {newest}" if newest else "finish that stage first: xc-train run its config"
        raise UserError(f"{path.resolve()} has no final weights ({cure})")
    return run, None


def _final(run: RunDir, model: XComposer2) -> Weights:
    found = HubFolder(run.final, "final weights")
    fits(final.entries(model.shapes()), found, "final weights")
    step = int(read_json(run.final / final.MANIFEST)["step"])
    return Weights(step, found.read, {name: found.facts[name].dtype for name in model.shapes()}, final.digest(run.path))


def _checkpointed(folder: Path, config: Config, model: XComposer2) -> Weights:
    from train.extensions import prepare_deepspeed

    prepare_deepspeed()
    from train.weights.checkpointed import Trained  # imports DeepSpeed, which only checkpoints need

    trained = Trained(folder, config)
    return Weights(trained.step, trained.read, dict.fromkeys(model.shapes(), trained.dtype), None)


def _write_weights(folder: Path, entries: Sequence[Entry], weights: Weights) -> str:
    places = {name: (entry, number) for entry in entries for number, name in enumerate(entry.theirs)}
    sizes = {name: prod(entry.theirs[name]) * weights.dtypes[entry.ours].itemsize for name, (entry, _) in places.items()}

    def read(name: str) -> Tensor:
        entry, number = places[name]
        return entry.split(weights.read(entry.ours))[number]

    shards = hub.write(folder, sizes, read)
    return f"{len(sizes)} tensors, {sum(sizes.values()) / 1e9:.3g} GB, {shards} {'file' if shards == 1 else 'files'}"


def _config_json(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The official config.json's keys with this model's values; code comes from the official repository."""
    decoder, tokenizer = config.model.decoder, Tokenizer(config.data.tokenizer)
    code = KHD_7B if config.model.projector.marks else REPOSITORIES.get((config.run.stage is Stage.compose, decoder.hidden), VL_7B)
    model_class = f"{code}--modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
    return {
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}--configuration_internlm_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": model_class,
            "AutoModelForCausalLM": model_class,
        },
        "bias": False,
        "bos_token_id": tokenizer.begin,
        "eos_token_id": tokenizer.end,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden,
        "img_size": config.data.images.size,
        "initializer_range": decoder.init_std,
        "intermediate_size": decoder.ffn,
        "max_length": config.data.context,
        "max_position_embeddings": decoder.max_positions,
        "model_type": "internlmxcomposer2",
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "pad_token_id": tokenizer.end,
        "rms_norm_eps": decoder.rms_eps,
        "rope_scaling": _rope_scaling(decoder, config.data.context),
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
        "vocab_size": decoder.vocab,
    }


def _rope_scaling(decoder: DecoderConfig, context: int) -> dict[str, Any] | None:
    """As the release has it where that means the same to documents of up to `context` tokens."""
    scaling = decoder.rope_scaling
    if scaling.kind is RopeKind.none:
        return RELEASED_SCALING if context <= decoder.max_positions else None
    return {"factor": scaling.factor, "type": scaling.kind.value}


def _code_of_tokenizer(config: Config) -> list[Path]:
    """Files of Python that `tokenizer_config.json` names in its `auto_map` and that belong beside it; they may be missing there.

    Raises:
        UserError: it cannot be read.
    """
    settings = Path(config.data.tokenizer) / "tokenizer_config.json"
    try:
        named = (read_json(settings) or {}).get("auto_map") or {}
    except ValueError:
        raise UserError(f"data.tokenizer: {settings} is no JSON (fetch the tokenizer again)") from None
    classes = [name for names in named.values() for name in ([names] if isinstance(names, str) else names)]
    files = {f"{name.partition('.')[0]}.py" for name in classes if name and re.fullmatch(r"\w+\.\w+", name)}  # REPOSITORY--... is the Hub's
    return [settings.with_name(file) for file in sorted(files)]


def _missing(code: Sequence[Path]) -> list[str]:
    return [f"tokenizer_config.json names {file.name}, which is not in {file.parent} (put it beside)" for file in code if not file.exists()]


def _copy_tokenizer(config: Config, code: Sequence[Path], folder: Path) -> None:
    """The tokenizer's files, and how transformers reads them where its folder does not say."""
    for file in [*(Path(config.data.tokenizer) / name for name in TOKENIZER_FILES), *code]:
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends}, indent=2))


def _card(run: RunDir, config: Config, weights: Weights, notes: Sequence[str]) -> str:
    last = next((line for line in reversed(jsonl.read(run.metrics)) if line.get("step") == weights.step), {})
    evaluation = read_json(run.evaluation)
    measured = evaluation if evaluation and weights.digest and evaluation.get("weights") == weights.digest else None
    return card.text(config, weights.step, last, measured, notes)

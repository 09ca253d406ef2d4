"""`xc-train export`: a run as a Hugging Face directory with the official InternLM-XComposer2 names, config values, tokenizer and card.

Invariant: what is written is bitwise what the run holds; the folder appears whole, by one rename, and nothing is overwritten. Weights that
the stage froze are compared with those that it began from: a language model that was not to change did not.
"""

import json
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
from train import configure, optim
from train.config import Config, Stage
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir, fsync_tree, read_json
from train.weights import card, exported, final, hub, initial, official
from train.weights.hub import HubFolder
from train.weights.internlm2 import is_base
from train.weights.mapping import Entry, fits

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
REPOSITORIES = {(True, 4096): "internlm/internlm-xcomposer2-7b", (False, 2048): "internlm/internlm-xcomposer2-vl-1_8b"}
"""Where the official modelling code lies, by whether the stage is composition, and width; for all others it is the VL-7B's."""
VL_7B = "internlm/internlm-xcomposer2-vl-7b"
KHD_7B = "internlm/internlm-xcomposer2-4khd-7b"
"""That of models with newline and separator."""
POSITIONS = 32768
"""InternLM2's longest context."""


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
    notes = [_unchanged(config, model, weights), *_differences(config)]
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        said = _write_weights(partial, entries, weights)
        (partial / "config.json").write_text(json.dumps(_config_json(config, weights.dtypes["head.weight"]), indent=2))
        (partial / exported.FILE).write_text(exported.to_yaml(config))
        _copy_tokenizer(config, partial)
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


def _unchanged(config: Config, model: XComposer2, weights: Weights) -> str:
    """Compares the frozen weights of the language model, bitwise, with those that the stage began from."""
    _, frozen = optim.resolve(model, config.train)
    names = {name for group in frozen for name in group.names if is_base(name)}
    if not names:
        return "the language model was trained in this stage: text-only logits are not those that it began with"
    try:
        began = initial.sources(config, model)
    except UserError as error:
        return f"frozen weights were not compared with those that the stage began from: {error}"
    compared = 0
    for source in began:
        for entry in (e for e in source.entries if e.ours in names):
            first = entry.join([source.folder.read(name) for name in entry.theirs])
            if not torch.equal(first.to(weights.dtypes[entry.ours]), weights.read(entry.ours)):
                raise UserError(f"{entry.ours} was frozen and is not what {source.folder.folder} holds (do not use these weights)")
            compared += 1
    if not compared:
        return "the language model was frozen with fresh weights: there was nothing to compare it with"
    return f"the language model's {compared} frozen tensors are those that the stage began from, bitwise: so are text-only logits"


def _differences(config: Config) -> list[str]:
    plora = config.model.plora
    found = []
    if plora.rank != official.RANK:
        found.append(f"PLoRA's rank is {plora.rank}: engines that take {official.RANK} for granted (lmdeploy) cannot load it")
    if plora.alpha / plora.rank != official.SCALE:
        scale = plora.alpha / plora.rank
        found.append(
            f"PLoRA's scale is {scale:g}: engines apply {official.SCALE:g}, and see images wrongly (multiply Plora_B by {scale:g})"
        )
    if config.model.projector.standardise:
        found.append("image features are standardised by vision_proj.features: engines do not, and see images wrongly")
    return found


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
        "max_position_embeddings": POSITIONS,
        "model_type": "internlmxcomposer2",
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "pad_token_id": tokenizer.end,
        "rms_norm_eps": decoder.rms_eps,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
        "vocab_size": decoder.vocab,
    }


def _copy_tokenizer(config: Config, folder: Path) -> None:
    """The tokenizer's files, and how transformers reads them where its folder does not say."""
    for name in TOKENIZER_FILES:
        file = Path(config.data.tokenizer) / name
        if file.exists():
            shutil.copyfile(file, folder / name)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends}, indent=2))


def _card(run: RunDir, config: Config, weights: Weights, notes: Sequence[str]) -> str:
    last = next((line for line in reversed(jsonl.read(run.metrics)) if line.get("step") == weights.step), {})
    evaluation = read_json(run.evaluation)
    measured = evaluation if evaluation and weights.digest and evaluation.get("weights") == weights.digest else None
    return card.text(config, weights.step, last, measured, notes)

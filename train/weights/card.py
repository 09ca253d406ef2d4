"""The model card of an export: which stage made it, from which data, how it was measured.

Invariant: pure; figures are those of the run's own files, and what the run does not know is not claimed.
"""

from collections.abc import Sequence
from typing import Any

from train.config import Config
from train.model_config import LowRankMode, ModelConfig

FIGURES = ("nll_right", "nll_wrong", "nll_blind", "retrieval_of_10", "greedy_exact")


def text(config: Config, step: int, last: dict[str, Any], evaluation: dict[str, Any] | None, notes: Sequence[str]) -> str:
    """Markdown with the Hub's header.

    Args:
        config: of the stage.
        step: of the weights.
        last: metrics of that step.
        evaluation: held-out figures of these weights, where they were measured.
        notes: what whoever loads the weights should know.
    """
    decoder, images = config.model.decoder, config.data.images
    began = config.run.init_from or ", ".join(w for w in (decoder.weights, config.model.vision.weights) if w) or "fresh weights"
    sources = [[name, source.weight, _at(last, f"loss_by_source/{name}")] for name, source in config.data.sources.items()]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [internlm-xcomposer2, partial-lora]",
        "---",
        f"# {config.run.name}",
        "An InternLM-XComposer2 trained with OpenXComposer; names and config values are those of the official release.",
        "",
        f"- stage: **{config.run.stage.value}**, step {step}, from {began}",
        f"- seen: {_count(last, 'data/tokens')} tokens, {_count(last, 'data/images')} images",
        f"- images: {images.size} x {images.size} pixels, {images.tokens} tokens each",
        f"- decoder: hidden {decoder.hidden}, {decoder.layers} layers; {_low_rank(config.model)}",
        f"- loss of the last step: {_at(last, 'loss/train')} nats a token",
        *(f"- {note}" for note in notes),
        "",
        "## Data",
        *_table(["source", f"weight ({config.data.unit.value})", "loss of the last step"], sources),
        "",
        "## Held-out figures",
        *_figures(evaluation),
    ]
    return "\n".join(lines) + "\n"


def _low_rank(model: ModelConfig) -> str:
    """Rank and scale, by linear where they differ."""
    plora = model.plora
    if plora.mode is LowRankMode.none:
        return "no low-rank weights"
    each = {"": plora, **{f"{name}: ": own for name, own in plora.linears.items()}}
    kind = "PLoRA" if plora.mode is LowRankMode.plora else "LoRA on all tokens"
    return f"{kind}: {'; '.join(f'{name}rank {own.rank}, scale {own.alpha / own.rank:g}' for name, own in each.items())}"


def _figures(evaluation: dict[str, Any] | None) -> list[str]:
    if not evaluation:
        return ["None were measured on these weights."]
    splits = evaluation.get("splits") or {}
    names = [figure for figure in FIGURES if any(figure in split for split in splits.values())]
    lines = _table(["split", "pictures", *names], [[s, v["pictures"], *(_at(v, n) for n in names)] for s, v in splits.items()])
    words = evaluation.get("text")
    return [
        *(lines if splits else []),
        *(["", f"Text alone: {words['nll']:.4f} nats a token over {words['tokens']} tokens."] if words else []),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _at(values: dict[str, Any], name: str) -> str:
    return f"{values[name]:.4f}" if isinstance(values.get(name), float) else "-"


def _count(values: dict[str, Any], name: str) -> str:
    return f"{int(values[name]):,}" if name in values else "an unknown number of"

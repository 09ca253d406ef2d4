"""The figures of a model's stages as one small JSON tree: what scripts and issues quote.

Invariant: a held-out split that any stage measured stands under every stage, with the same keys; what is missing is
null. Held-out figures are of the test halves alone; of a split that has none, of all of it.
"""

import math
from collections import Counter
from typing import Any

from train.report.collect import Stage, split_and_half

STAGES = ("pretrain", "sft")
SPLITS = ("unseen_picture", "unseen_concept")
FIGURES = ("nll_right", "nll_wrong", "retrieval_of_10", "greedy_exact")


def summarise(stages: list[Stage]) -> dict[str, Any]:
    """What `summary.json` holds. Of two runs of one stage the later counts."""
    by_name = {stage.stage: stage for stage in stages}
    language, pretrain, sft = (by_name.get(name) for name in ("language", *STAGES))
    seeing = dict.fromkeys([*STAGES, *(s.stage for s in stages if s.stage != "language")])
    seconds = {name: by_name[name].train_seconds if name in by_name else None for name in dict.fromkeys(["language", *seeing])}
    known = [s for s in seconds.values() if s is not None]
    summary = {
        "stages": {name: {split: _split(by_name.get(name), language, split) for split in split_names(stages)} for name in seeing},
        "text_nll": {"before": _text(language, "nll"), "after_pretrain": _text(pretrain, "nll"), "after_sft": _text(sft, "nll")},
        "text_logits_sha256": {"before": _text(language, "logits_sha256"), "after_pretrain": _text(pretrain, "logits_sha256")},
        "plora_b_norm": {"after_pretrain": (pretrain.evaluation or {}).get("plora_b_norm") if pretrain else None},
        "train_seconds": {**seconds, "total": sum(known) if known else None},
        "resumes": sum(stage.resumes for stage in stages),
        "ledger": ledger_counts(stages),
    }
    return _finite(summary)


def split_names(stages: list[Stage]) -> list[str]:
    """Held-out splits that were measured; the demo's two where one of them was, or nothing."""
    found = [split for stage in stages for split, _ in map(split_and_half, stage.splits())]
    return list(dict.fromkeys([*(SPLITS if set(SPLITS) & set(found) or not found else ()), *found]))


def ledger_counts(stages: list[Stage]) -> dict[str, dict[str, int]]:
    """Bad samples by reason.

    `index` is what the indexes left out, each sample once though several stages read it; `run` is what was dropped while training, each
    segment once though a life replayed its step.
    """
    index, run = {}, []
    for stage in stages:
        sources = (stage.config.get("data") or {}).get("sources") or {}
        for entry in stage.ledger:
            if "step" in entry:
                run.append(entry)
            else:
                place = (sources.get(entry["source"]) or {}).get("path", entry["source"])
                index[place, entry["shard"], entry["offset"]] = entry
    return {"index": _by_reason(list(index.values())), "run": _by_reason(run)}


def reason_of(entry: dict[str, Any]) -> str:
    """The kind of damage, without the detail that follows a colon."""
    return str(entry.get("reason", "not said")).partition(":")[0]


def _by_reason(entries: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(reason_of(entry) for entry in entries).most_common())


def _split(stage: Stage | None, language: Stage | None, split: str) -> dict[str, Any]:
    own = (stage.split(split) if stage else None) or {}
    base = (language.split(split) if language else None) or {}
    errors = {**(own.get("stderr") or {}), "nll_language_model": (base.get("stderr") or {}).get("nll_blind")}
    return {
        **{figure: own.get(figure) for figure in FIGURES},
        "nll_language_model": base.get("nll_blind"),
        "stderr": errors if own else None,
    }


def _text(stage: Stage | None, figure: str) -> Any:
    return ((stage.text() if stage else None) or {}).get(figure)


def _finite(value: Any) -> Any:
    """Numbers that JSON does not know become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

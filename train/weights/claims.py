"""What an export must be told with: what of the language model is as it was, and where engines would do other than this model.

Invariant: nothing is claimed that was not compared; engines are the official modelling code that config.json names, and lmdeploy.
"""

from collections.abc import Callable, Mapping
from math import isclose

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from train import optim
from train.config import Config
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRankMode
from train.weights import initial, meaning, official
from train.weights.internlm2 import is_base


def unchanged(config: Config, model: XComposer2, read: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype]) -> str:
    """Compares the frozen weights of the language model, bitwise, with those that the stage began from, and says what follows.

    Args:
        config: of the stage.
        model: on the meta device.
        read: gives a parameter of the export by name.
        dtypes: number formats of all parameters.

    Raises:
        UserError: a frozen weight moved.
    """
    _, groups = optim.resolve(model, config.train)
    base = {name for name in model.shapes() if is_base(name)}
    frozen = base.intersection(name for group in groups for name in group.names)
    if not frozen:
        return "the language model was trained in this stage: text-only logits are not those that it began with"
    try:
        began = initial.sources(config, model)
    except UserError as error:
        return f"frozen weights were not compared with those that the stage began from: {error}"
    compared, rounded = 0, False
    for source in began:
        for entry in (e for e in source.entries if e.ours in frozen):
            first = entry.join([source.folder.read(name) for name in entry.theirs])
            if not torch.equal(first.to(dtypes[entry.ours]), read(entry.ours)):
                raise UserError(f"{entry.ours} was frozen and is not what {source.folder.folder} holds (do not use these weights)")
            compared, rounded = compared + 1, rounded or first.dtype != dtypes[entry.ours]
    if not compared:
        return "what the stage froze of the language model had fresh weights: there was nothing to compare it with"
    in_format = f", in {str(dtypes['head.weight']).removeprefix('torch.')}" if rounded else ""
    found = f"the language model's {compared} frozen tensors are those that the stage began from, bitwise{in_format}"
    if frozen != base:
        return f"{found}; its other {len(base - frozen)} were trained: text-only logits are not those that it began with"
    if config.model.plora.mode is LowRankMode.lora:
        return f"{found}; but low-rank weights act on text too (model.plora.mode: lora): text-only logits may be others"
    return f"{found}: so are text-only logits"


def engines(config: Config) -> list[str]:
    """Where engines would do otherwise, a line each."""
    plora, found = config.model.plora, []
    if plora.mode is LowRankMode.none:
        found.append(
            "there are no low-rank weights (model.plora.mode: none): engines look for Plora_A and Plora_B, and see images wrongly without"
        )
    else:
        found += _low_rank(config)
    if plora.mode is LowRankMode.lora:
        found.append(
            "low-rank weights act on all tokens (model.plora.mode: lora): engines apply them to image tokens only, and read text wrongly"
        )
    if config.model.projector.standardise:
        found.append("image features are standardised by vision_proj.features: engines do not, and see images wrongly")
    return found


def _low_rank(config: Config) -> list[str]:
    """Rank and scale that engines do not know, with the linears that have them."""
    known = official.low_rank(config.model.projector.marks)
    ranks: dict[tuple[int, int], list[str]] = {}
    scales: dict[tuple[float, float], list[str]] = {}
    for name in meaning.LINEARS:
        own, theirs = meaning.low_rank_of(config.model, name), known[name]
        scale, applied = own.alpha / own.rank, theirs.alpha / theirs.rank
        if own.rank != theirs.rank:
            ranks.setdefault((own.rank, theirs.rank), []).append(name)
        if not isclose(scale, applied):
            scales.setdefault((scale, applied), []).append(name)
    return [
        *(
            f"PLoRA's rank is {rank} in {', '.join(names)}: engines take {applied} for granted, and cannot load it"
            for (rank, applied), names in ranks.items()
        ),
        *(
            f"PLoRA's scale is {scale:g} in {', '.join(names)}: engines apply {applied:g}, and see images wrongly "
            f"(multiply Plora_B by {scale / applied:g} there)"
            for (scale, applied), names in scales.items()
        ),
    ]

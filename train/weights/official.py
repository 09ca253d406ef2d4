"""Names of the released InternLM-XComposer2: InternLM2's, PLoRA beside each linear, CLIP's tower, and the projector.

Invariant: every parameter of the model has exactly one place there, so that what is written can be read back, bitwise.
"""

from train.model_config import LowRank
from train.weights import clip, internlm2
from train.weights.mapping import Entry, Shape, Shapes
from train.weights.meaning import LINEARS

VIT = "vit.vision_tower.vision_model."
IGNORED = rf"({internlm2.IGNORED})|({clip.IGNORED})"
PROJECTOR = {"linear_in": "0", "linear_out": "2"}
MARKS = {"projector.newline": ("plora_sub_GN", 4), "projector.separator": ("plora_glb_GN", 3)}
"""4KHD's learned embeddings: name and number of dimensions, all but the last of size one."""
MEASURED = {"projector.feature_mean": "vision_proj.features.mean", "projector.feature_std": "vision_proj.features.std"}
"""Ours alone: the official code does not standardise features."""
PLORA = {"plora_a": "Plora_A.weight", "plora_b": "Plora_B.weight"}


def low_rank(marks: bool) -> dict[str, LowRank]:
    """Rank and alpha of each linear that engines take for granted; `marks`: in the code of 4KHD, which has newline and separator."""
    found = {name: LowRank(256, 256.0) for name in LINEARS}
    return found | ({"wqkv": LowRank(8, 16.0)} if marks else {})


def entries(shapes: Shapes, architecture: str) -> list[Entry]:
    """Every parameter of the model; `architecture` is model.vision.name.

    Raises:
        UserError: the vision tower is not CLIP's.
    """
    tower = clip.entries(shapes, architecture, VIT)
    return [*(_entry(ours, shape) for ours, shape in shapes.items() if not ours.startswith(clip.VIT)), *tower]


def _entry(ours: str, shape: Shape) -> Entry:
    if ours not in MARKS:
        return Entry(ours, {_name(ours): shape})
    name, dimensions = MARKS[ours]
    theirs = (1,) * (dimensions - 1) + shape[-1:]
    return Entry(ours, {name: theirs}, lambda parts: parts[0].view(shape), lambda parameter: [parameter.view(theirs)])


def _name(ours: str) -> str:
    if ours in MEASURED:
        return MEASURED[ours]
    module, _, kind = ours.rpartition(".")
    if module.startswith("projector."):
        return f"vision_proj.{PROJECTOR[module.removeprefix('projector.')]}.{kind}"
    return internlm2.name(f"{module}.{PLORA.get(kind, kind)}")

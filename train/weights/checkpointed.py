"""The weights of a checkpoint: trained ones from the engine's files, frozen ones from where the stage began.

Invariant: the checkpoint has passed its manifest before anything of it is read.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from train import checkpoint, optim
from train.config import Config
from train.model.xcomposer2 import XComposer2
from train.weights import initial


class Trained:
    """Parameters by name, in the number format of the run. Holds the whole model in memory."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Reads the checkpoint and the stage's first weights.

        Raises:
            UserError: the checkpoint is damaged, or the stage began from other weights than those that are there now.
        """
        damage = checkpoint.problem(folder)
        if damage:
            raise UserError(f"{folder} is no complete checkpoint: {damage} (give another one)")
        state = checkpoint.read_state(folder)
        if state.base_digest != initial.digest(config):
            raise UserError(f"{folder}: its stage began from other weights than those that are there now (put them back)")
        self.step = state.step
        self.dtype = getattr(torch, state.dtype.removeprefix("torch."))
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
        initial.fill(model, config)
        self.model = model.to(self.dtype)
        trained, _ = optim.resolve(model, config.train)
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}
        found = _partitioned(folder) if state.zero_stage == 3 else _whole(folder)
        for name in (name for group in trained for name in group.names):
            if name not in found:
                raise UserError(f"{folder} lacks {name} (give another checkpoint)")
            self._parameters[name].copy_(found[name])

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._parameters[name]


def _whole(folder: Path) -> dict[str, Tensor]:
    """ZeRO 0 to 2: one file has them all."""
    return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False, mmap=True)["module"]


def _partitioned(folder: Path) -> dict[str, Tensor]:
    """ZeRO-3: each rank has its part, in fp32 beside its optimizer state; rounding them gives the weights that the run had."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(sys.stderr):  # it tells what it does; stdout is for what was asked for
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, exclude_frozen_parameters=True)

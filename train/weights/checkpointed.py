"""The weights of a checkpoint: trained ones from the engine's files, frozen ones from where the stage began.

Invariant: the checkpoint has passed its manifest before anything of it is read, and nothing in it is executed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from train import checkpoint, intact, optim
from train.config import Config
from train.model.xcomposer2 import XComposer2
from train.weights import initial

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Torch's."""


class Trained:
    """Parameters by name, in the number format of the run. Holds the whole model in memory."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Reads the checkpoint and the stage's first weights.

        Raises:
            UserError: the checkpoint is damaged, or the stage began from other weights than those that are there now.
        """
        damage = intact.problem(folder)
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
    with _restricted(folder):
        return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True, mmap=True)["module"]


def _partitioned(folder: Path) -> dict[str, Tensor]:
    """ZeRO-3: each rank has its part, in fp32 beside its optimizer state; rounding them gives the weights that the run had."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _restricted(folder), redirect_stdout(sys.stderr):  # it prints; what the user asked for goes to stdout
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, exclude_frozen_parameters=True)


@contextmanager
def _restricted(folder: Path) -> Iterator[None]:
    """Inside it torch reads tensors and what DeepSpeed keeps beside them, and runs nothing of a file; its switch in the environment
    overrules DeepSpeed's reader, which asks for anything.

    Raises:
        UserError: there is more in a file.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            yield
    except UnpicklingError:
        raise UserError(f"{folder} holds other things than a checkpoint does, which might be code (give another one)") from None
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before

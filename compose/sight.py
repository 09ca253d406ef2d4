"""Pictures as the model sees them: one vector a picture, the mean of its image tokens, for finding pictures by a picture.

Invariant: a vector depends on the picture and on the weights alone (up to rounding); vectors of other weights are never compared.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.read import images
from data_pipeline.read.images import Picture as Looked
from train.config import Stage
from train.weights.opened import open_model

TILES = 32
"""Encoded at once."""


class Sight:
    """The vision tower and projector of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        """Opens it.

        Raises:
            UserError: it cannot be opened, or has seen no picture.
        """
        opened = open_model(checkpoint)
        if opened.config.run.stage is Stage.language:
            raise UserError(
                f"{checkpoint.absolute()} is of stage language, which has seen no picture (take one of pretrain, sft or compose)"
            )
        self._model, self._policy = opened.model, opened.config.data.images
        self.weights = opened.weights
        """Their digest."""
        self.width: int = opened.config.model.decoder.hidden

    def look(self, data: bytes) -> Looked:
        """An encoded picture as the vision tower gets it.

        Raises:
            BadSample: it does not decode.
        """
        return images.load(data, self._policy, None)

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Looked]) -> np.ndarray:
        """[n, width] float32, each of length 1. A picture of several tiles is the mean over all of them."""
        tiles = [tile for picture in pictures for tile in picture.tiles]
        device = next(self._model.parameters()).device
        of_tiles = []
        for start in range(0, len(tiles), TILES):
            tiles_MCHW = torch.from_numpy(np.stack(tiles[start : start + TILES])).to(device)
            tokens = len(tiles_MCHW) * self._model.projector.tokens
            rows_VD = self._model.projector(self._model.vision(tiles_MCHW))[:tokens]  # a newline and a separator may follow
            of_tiles.append(rows_VD.unflatten(0, (len(tiles_MCHW), -1)).float().mean(1).cpu().numpy())
        last = np.cumsum([len(picture.tiles) for picture in pictures])[:-1]
        return unit(np.stack([part.mean(0) for part in np.split(np.concatenate(of_tiles), last)]))


def centred(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Without what all pictures share: of length 1 again. On raw vectors any two pictures look alike."""
    return unit(vectors - centre)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1; the zero vector stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)

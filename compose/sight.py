"""Pictures as the model sees them: one vector a picture, the mean of its image tokens, for finding pictures by a picture.

Invariant: a vector depends on the picture and on the weights alone (up to rounding); vectors of other weights are never compared.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from compose import assistant
from compose.embed import unit
from data_pipeline.read import images
from data_pipeline.read.images import Picture as Looked

TILES = 32
"""Encoded at once."""


class Sight:
    """The vision tower and projector of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        """Opens it.

        Raises:
            UserError: it cannot be opened, or has seen no picture.
        """
        assistant.prompter(checkpoint).require_sight()
        seer = assistant.load(checkpoint)
        self._model, self._policy = seer.model, seer.images
        self.weights = seer.weights
        """Their digest."""

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

"""What a checkpoint file holds, flattened."""

from typing import Any

import torch


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, each in items for name, tensor in tensors(each, f"{path}/{key}").items()}

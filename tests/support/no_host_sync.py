"""A guard for tests: inside it, whatever makes the host wait for a tensor's value raises.

Invariant: it sees what happens below Python too (a dispatch mode), on the CPU, where such reads cost nothing and go unnoticed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2", "repeat_interleave"}


class _Guard(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert name not in WAITING and not masks, f"host sync: {function}"
        return function(*args, **(kwargs or {}))


def _refuse(*_, **__):
    raise AssertionError("host sync: a tensor's value was read")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises AssertionError at the first read of a tensor's value, and at shapes that depend on one."""
    methods = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
    with mock.patch.multiple(Tensor, **dict.fromkeys(methods, _refuse)), _Guard():
        yield

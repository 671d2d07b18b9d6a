"""Telling whether a tensor is still what it was, without looking at its numbers."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Stamp:
    """Equal while a tensor is the same memory of the same living tensor with the same contents."""

    def __init__(self, tensor: Tensor) -> None:
        owner = tensor if tensor._base is None else tensor._base
        self.owner = weakref.ref(owner)
        self.version = -1 if tensor.is_inference() else tensor._version
        # A tensor that is made of others (torchao's) has no memory of its own.
        parts = [getattr(tensor, name) for name in _parts(tensor)]
        where: Any = tuple(map(Stamp, parts)) if parts else tensor.data_ptr()
        self.where = (where, tensor.device, tensor.dtype, tensor.shape)

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Stamp) and self.owner() is not None and self.owner() is other.owner()
                and (self.version, self.where) == (other.version, other.where) and self.version >= 0)


def _parts(tensor: Any) -> list[str]:
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    return [] if flatten is None else flatten(tensor)[0]

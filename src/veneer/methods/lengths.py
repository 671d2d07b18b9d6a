"""The squared lengths of a frozen weight's rows, kept while the weight is the same."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


def kept_squares(cache: dict[str, Any], weight: Tensor, wide: torch.dtype) -> Tensor:
    """‖W‖² of every row (*batch, out), in `wide`; kept in `cache` while W is the same tensor with the same contents."""
    if torch.compiler.is_compiling():
        return squares(weight, wide)
    key = (Stamp(weight), wide)
    if "base" not in cache or cache["base"][0] != key:
        cache["base"] = (key, squares(weight, wide))
    return cache["base"][1]


def squares(weight: Tensor, wide: torch.dtype) -> Tensor:
    """‖W‖² of every row, summed in `wide`."""
    # Row blocks: widening a whole 16-bit weight at once would be the largest tensor of the step.
    rows = weight.reshape(-1, weight.shape[-1])
    blocks = [block.to(wide).square().sum(-1) for block in rows.split(1024)]
    return torch.cat(blocks).reshape(weight.shape[:-1])


class Stamp:
    """Equal while a tensor is the same memory of the same living tensor with the same contents."""

    def __init__(self, tensor: Tensor) -> None:
        owner = tensor if tensor._base is None else tensor._base
        self.owner = weakref.ref(owner)
        self.version = -1 if tensor.is_inference() else tensor._version
        self.where = (tensor.data_ptr(), tensor.dtype, tensor.shape)

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Stamp) and self.owner() is not None and self.owner() is other.owner()
                and (self.version, self.where) == (other.version, other.where) and self.version >= 0)

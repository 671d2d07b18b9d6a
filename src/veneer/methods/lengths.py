"""The squared lengths of a frozen weight's rows, kept while the weight is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.stamp import Stamp


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

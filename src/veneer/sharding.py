"""Tensors spread over processes, whole and spread again: for files, and for what is added up over a whole."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor (FSDP2, tensor parallelism)."""
    return _distributed() is not None and isinstance(tensor, _distributed().DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one gathered, for which every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor spread as `like` is."""
    if not is_sharded(like):
        return tensor
    there: Any = like
    return _distributed().distribute_tensor(tensor.to(like.device), there.device_mesh, there.placements)


def _distributed() -> Any:
    # Where nothing has imported it there are no DTensors, and importing it takes half a second.
    return sys.modules.get("torch.distributed.tensor")

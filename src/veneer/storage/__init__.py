"""How a weight is stored: read as dense, written back if that is safe. One optional library per file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.storage.awq import AWQ
from veneer.storage.base import Storage
from veneer.storage.bitsandbytes_4bit import BitsAndBytes4Bit
from veneer.storage.bitsandbytes_8bit import BitsAndBytes8Bit
from veneer.storage.gguf_blocks import GGUFBlocks
from veneer.storage.gptq import GPTQ
from veneer.storage.hqq_weights import HQQWeights
from veneer.storage.packed import Packed
from veneer.storage.torchao_weights import TorchaoWeights, holds

#: asked in this order; what none of them claims is an ordinary parameter
STORAGES: tuple[Storage, ...] = (
    Packed(), BitsAndBytes4Bit(), BitsAndBytes8Bit(), TorchaoWeights(), HQQWeights(), GGUFBlocks(), GPTQ(), AWQ())

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def packed_storage(module: nn.Module) -> Storage | None:
    """The storage that holds this module's `weight` in fewer bits, or None where it is an ordinary parameter."""
    return next((storage for storage in STORAGES if storage.claims(module)), None)


def unreadable(tensor: Tensor, name: str) -> str | None:
    """Why nothing here can read an unpacked parameter as dense numbers, or None."""
    if tensor.dtype in _FLOATS and not holds(tensor):
        return None
    known = ", ".join(storage.name for storage in STORAGES)
    return (f"{name!r} is stored as {type(tensor).__name__} of {tensor.dtype}, which cannot be read as dense numbers; "
            f"load the model dequantised (float32, bfloat16, float16 or float64), or in a form read here: {known}")


__all__ = ["STORAGES", "Storage", "packed_storage", "unreadable"]

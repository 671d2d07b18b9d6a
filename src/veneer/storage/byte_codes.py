"""Codes of one byte times a scale for each row, as dense numbers: in pieces that stay in a CPU's cache."""

from __future__ import annotations

import torch
from torch import Tensor

#: elements worked on at a time: temporaries of less than a MiB, whose pages the allocator keeps
_PIECE = 2**17


def scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (n, k), int8 or one of the float8 types, times scales (n, 1) in fp32, rounded once to `dtype`; a fresh
    tensor. On a CPU only: elsewhere one large operation is the faster one."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, _PIECE // codes.shape[1])
    for at in range(0, len(codes), step):
        part = slice(at, at + step)
        values = _floats(codes[part])
        if dtype == torch.float32:
            torch.mul(values, scales[part], out=out[part])
        else:
            out[part] = values.mul_(scales[part])
    return out


def _floats(codes: Tensor) -> Tensor:
    if codes.dtype == torch.int8:
        return codes.float()
    # Looking a float8 number up is faster than PyTorch's conversion on a CPU.
    return _TABLES[codes.dtype].index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


#: what every byte means. Made here and not at the first use, which may be under another default device or fake tensors
_TABLES = {dtype: torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()
           for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)}

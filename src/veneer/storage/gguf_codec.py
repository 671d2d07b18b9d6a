"""GGUF's blocks read in plain PyTorch, on any device; rarer kinds by the `gguf` package, on the CPU.

A row of a weight is a row of blocks; a block is a few scales and the codes of 32 or 256 numbers, laid out as ggml has
them (ggml-common.h of github.com/ggml-org/ggml). Values are computed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.method import VeneerError
from veneer.storage.base import library

#: elements worked on at a time: temporaries of less than a MiB stay in the cache, and the allocator keeps their pages
_CHUNK = 2**17


class Kind(NamedTuple):
    """A kind of block: ggml's name for it, numbers in a block, bytes of a block."""

    name: str
    numbers: int
    bytes: int


def kind_of(ggml_type: int) -> Kind:
    """The kind of a ggml type number; `VeneerError` for one that is no kind of block."""
    if ggml_type in KINDS:
        return KINDS[ggml_type]
    gguf: Any = library("gguf", "gguf")
    known = {int(kind): kind for kind in gguf.GGML_QUANT_SIZES}
    kind = known.get(int(ggml_type))
    if kind is None or kind.name.startswith(("F", "I8", "I16", "I32", "I64", "BF")):
        blocks = ", ".join(f"{number} ({kind.name})" for number, kind in KINDS.items())
        raise VeneerError(f"ggml type {int(ggml_type)}{f' ({kind.name})' if kind else ''} is no kind of packed block; "
                          f"known are {blocks}, and those of the gguf package")
    return Kind(kind.name, *gguf.GGML_QUANT_SIZES[kind])


@torch.no_grad()
def decode(blocks: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """uint8 (out, bytes of a row) → the weight (out, in) in `dtype`, a fresh tensor."""
    kind = kind_of(ggml_type)
    rows = blocks.shape[0]
    read = _DECODERS.get(ggml_type)
    if read is None:
        gguf: Any = library("gguf.quants", "gguf")
        types: Any = library("gguf", "gguf")
        values = gguf.dequantize(blocks.cpu().numpy(), types.GGMLQuantizationType(int(ggml_type)))
        return torch.from_numpy(values).to(blocks.device, dtype).view(rows, -1)
    flat = blocks.reshape(-1, kind.bytes)
    out = torch.empty(len(flat), kind.numbers, dtype=dtype, device=blocks.device)
    step = (_CHUNK if blocks.device.type == "cpu" else 32 * _CHUNK) // kind.numbers
    for at in range(0, len(flat), step):
        out[at:at + step] = read(flat[at:at + step])
    return out.view(rows, -1)


@torch.no_grad()
def encode(matrix: Tensor, ggml_type: int) -> Tensor:
    """A matrix (out, in) as blocks, uint8 (out, bytes of a row), by the gguf package; Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""
    kind = kind_of(ggml_type)
    if ggml_type not in _WRITTEN:
        raise VeneerError(f"a weight held as GGUF {kind.name} cannot be quantised again; merge it into dense numbers")
    if matrix.shape[1] % kind.numbers:
        raise VeneerError(f"a row of {matrix.shape[1]} numbers is no row of {kind.name} blocks of {kind.numbers}")
    gguf: Any = library("gguf.quants", "gguf")
    types: Any = library("gguf", "gguf")
    made = gguf.quantize(matrix.float().cpu().numpy(), types.GGMLQuantizationType(int(ggml_type)))
    return torch.from_numpy(made).to(matrix.device)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of every block, fp32 (n, 1)."""
    return blocks[:, at:at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 (n, 16) → (n, 32): the low halves of the bytes, then the high ones."""
    codes = codes.contiguous()  # a small copy, after which both operations are vectorised
    return torch.cat([codes & 15, codes >> 4], 1)


def _bits(held: Tensor) -> Tensor:
    """uint8 (n, 4) → its 32 bits, lowest first, as the fifth bits of codes."""
    shifts = torch.arange(8, dtype=torch.uint8, device=held.device)
    return (((held.unsqueeze(-1) >> shifts) & 1) << 4).view(len(held), 32)


def _q4_0(b: Tensor) -> Tensor:
    return _nibbles(b[:, 2:]).float().sub_(8).mul_(_half(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 6:]) | _bits(b[:, 2:6])).float().sub_(16).mul_(_half(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _bits(b[:, 4:8])).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_half(b, 0))


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the 8 parts of a Q4_K or Q5_K block, (n, 8, 1): 6 bits each in 12 bytes."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    offsets = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return (_half(b, 0) * scales).unsqueeze(-1), (_half(b, 2) * offsets).unsqueeze(-1)


def _k_codes(codes: Tensor) -> Tensor:
    """uint8 (n, 128) → (n, 8, 32): of every 32 bytes the low halves are one part, the high ones the next."""
    quarters = codes.reshape(-1, 4, 1, 32)
    return torch.cat([quarters & 15, quarters >> 4], 2).view(-1, 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scales, offsets = _k_scales(b)
    return _k_codes(b[:, 16:]).float().mul_(scales).sub_(offsets).view(-1, 256)


def _q5_k(b: Tensor) -> Tensor:
    scales, offsets = _k_scales(b)
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device).view(8, 1)
    fifth = ((b[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4  # part i has bit i of these 32 bytes
    return (_k_codes(b[:, 48:]) | fifth).float().mul_(scales).sub_(offsets).view(-1, 256)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 1, 2, 32)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).view(4, 1)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    scales = _half(b, 208) * b[:, 192:208].view(torch.int8)
    return (low | high).float().sub_(32).view(-1, 16, 16).mul_(scales.unsqueeze(-1)).view(-1, 256)


#: by ggml's type numbers
KINDS = {2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22), 7: Kind("Q5_1", 32, 24),
         8: Kind("Q8_0", 32, 34), 12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176), 14: Kind("Q6_K", 256, 210)}
_DECODERS: dict[int, Callable[[Tensor], Tensor]] = {2: _q4_0, 3: _q4_1, 6: _q5_0, 7: _q5_1, 8: _q8_0, 12: _q4_k,
                                                    13: _q5_k, 14: _q6_k}
_WRITTEN = (2, 3, 6, 7, 8)

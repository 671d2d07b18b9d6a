"""Normal floats: a matrix in 4 (2, 8) bits an element, in plain PyTorch on any device. No library is needed.

NF4 is the data type of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): every block of elements is divided by its
largest magnitude, and each quotient is rounded to the nearest of 16 levels, which are quantiles of a normal
distribution with an exact zero and with both ends at ±1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from veneer.method import VeneerError, check_positive_int

BITS = (2, 4, 8)
#: blocks whose scales are doubly quantised together
GROUP = 256
#: elements worked on at a time: temporaries of less than a MiB stay in the cache, and the allocator keeps their pages
_CHUNK = 2**17
_TINY = torch.finfo(torch.float32).tiny

#: Appendix E of the paper, as it prints them
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def _quantiles(bits: int) -> tuple[float, ...]:
    """The levels by NF4's construction: half of them normal quantiles up to a tail, one less below zero, and zero.

    The tail is NF4's for all widths. One that grew with the number of levels, as the paper's formula could also be
    read, would spend NF8's levels where the largest of 64 normal numbers seldom lies (2.6 times the error).
    """
    tail, half = 929 / 960, 2 ** (bits - 1)  # 1 − (1/30 + 1/32)/2
    inverse = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [inverse(tail + (0.5 - tail) * i / count) / inverse(tail) for i in range(count)]

    return (*(-x for x in side(half - 1)), 0.0, *reversed(side(half)))


def levels(bits: int) -> Tensor:
    """The 2^bits levels in rising order, fp32, from -1 to 1."""
    return _LEVELS[bits].clone()


def _byte_table(bits: int) -> Tensor:
    """What each byte stands for, (256, 8 // bits); the first element of a byte is in its highest bits."""
    byte, shifts = torch.arange(256, device="cpu").unsqueeze(1), torch.arange(8 - bits, -1, -bits, device="cpu")
    return _LEVELS[bits][(byte >> shifts) & (2**bits - 1)]


def _between(rising: Tensor) -> Tensor:
    return (rising[1:] + rising[:-1]) / 2


_LEVELS = {bits: torch.tensor(_NF4 if bits == 4 else _quantiles(bits), dtype=torch.float32, device="cpu")
           for bits in BITS}
# A doubly quantised scale is outer · (u/255)³. The cube keeps a block of small numbers beside one with an outlier: at a
# hundredth of the largest scale the error is still below 3%, where even steps would have 20%.
_CUBES = ((torch.arange(256, dtype=torch.float64, device="cpu") / 255) ** 3).float()
#: one element of a wide dtype per byte: looking up one of those is several times faster than looking up a row
_WIDE = {2: torch.complex128, 4: torch.int64, 8: torch.float32}
_TABLES = {"cubes": _CUBES, "cube bounds": _between(_CUBES)}
for _bits in BITS:
    _TABLES[f"bounds {_bits}"] = _between(_LEVELS[_bits])
    _TABLES[f"bytes {_bits}"] = _byte_table(_bits).contiguous().view(_WIDE[_bits]).view(-1)
_ELSEWHERE: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, device: torch.device) -> Tensor:
    """A constant on `device`, copied there once."""
    if device.type == "cpu":
        return _TABLES[name]
    if (name, device) in _ELSEWHERE:
        return _ELSEWHERE[name, device]
    with torch.inference_mode(False):
        copy = _TABLES[name].to(device)
    if type(copy) is Tensor:  # not what a tracer puts in its place
        _ELSEWHERE[name, device] = copy
    return copy


@dataclass(eq=False)
class NormalFloat:
    """An encoded matrix. Everything but the shape lies on one device.

    codes: uint8, 8 // bits elements to a byte with the first in the highest bits, over the flattened matrix (row by
    row), whose last block is filled up with zeros.
    scales: the largest magnitude of every block, fp32 (blocks,); or uint8 (blocks,) when doubly quantised.
    outer: fp32 (groups,), to which the uint8 scales of each 256 blocks are relative; None where scales are fp32.
    shape: (out, in). block: elements to a scale.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor | None
    shape: tuple[int, int]
    bits: int
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.outer) if t is not None)

    def absmax(self) -> Tensor:
        """The scale of every block, fp32 (blocks,)."""
        if self.outer is None:
            return self.scales
        return _doubly(self.scales, self.outer)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) in `dtype`, a fresh tensor: each level times its scale in fp32, then rounded."""
        with torch.no_grad():  # no decorator: torch.compile cannot call a decorated method of an object it made
            return self._decode(dtype)

    def _decode(self, dtype: torch.dtype) -> Tensor:
        scales = self.absmax()
        table = _table(f"bytes {self.bits}", self.codes.device)
        out = torch.empty(len(scales), self.block, dtype=dtype, device=self.codes.device)
        step = max(1, (_CHUNK if self.codes.device.type == "cpu" else 32 * _CHUNK) // self.block)
        bytes_ = self.codes.view(len(scales), -1)
        for at in range(0, len(scales), step):
            part = slice(at, at + step)
            values = table.index_select(0, bytes_[part].reshape(-1).int()).view(torch.float32).view(-1, self.block)
            if dtype == torch.float32:
                torch.mul(values, scales[part].unsqueeze(1), out=out[part])
            else:
                out[part] = values.mul_(scales[part].unsqueeze(1))
        return out.view(-1)[:self.shape[0] * self.shape[1]].view(self.shape)


@torch.no_grad()
def encode(weight: Tensor, bits: int = 4, block: int = 64, double: bool = True) -> NormalFloat:
    """`weight` (out, in), of any floating dtype, in `bits` (2, 4 or 8) an element; on its device, in pieces, so that no
    temporary of the weight's size is made.

    block: elements to a scale. double: hold the scales in 8 bits, relative to the largest of each 256 of them.
    What has been decoded is encoded to itself: decode(encode(decode(x))) has the bits of decode(x) in fp32. A block
    whose largest magnitude is no normal fp32 number is encoded as zeros.
    Raises `VeneerError` for NaN or infinite values, for what is no floating matrix, and for settings not possible.
    """
    check_settings("encode", bits, block)
    _check_matrix(weight)
    flat = weight.detach().reshape(-1)
    absmax = torch.cat([each.abs().amax(1) for each in _pieces(flat, block)])
    _check_finite(weight, absmax, block)
    absmax[absmax < _TINY] = 0
    scales, outer = _quantised_scales(absmax) if double else (absmax, None)
    # Divided by the block's own largest value, not by what is kept of it: that element is then ±1, and so what is
    # decoded has exactly the kept scales again.
    divisor = torch.where(scales == 0, torch.inf, absmax)
    bounds = _table(f"bounds {bits}", flat.device)
    step, codes = max(1, _CHUNK // block), []
    for i, piece in enumerate(_pieces(flat, block)):
        quotient = piece.div_(divisor[i * step:i * step + len(piece)].unsqueeze(1))
        codes.append(_to_bytes(torch.bucketize(quotient, bounds, out_int32=True), bits))
    return NormalFloat(torch.cat(codes), scales, outer, (weight.shape[0], weight.shape[1]), bits, block)


def _pieces(flat: Tensor, block: int) -> Iterator[Tensor]:
    """fp32 copies (blocks of this piece, block), the last block filled up with zeros."""
    step = max(1, _CHUNK // block) * block
    for at in range(0, flat.numel(), step):
        part = flat[at:at + step]
        piece = torch.zeros(-(-part.numel() // block) * block, dtype=torch.float32, device=flat.device)
        piece[:part.numel()] = part
        yield piece.view(-1, block)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    parts = codes.view(-1, 8 // bits)
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.int32, device=codes.device)
    return (parts << shifts).sum(1, dtype=torch.int32).to(torch.uint8)


def _quantised_scales(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (blocks,) and fp32 (groups,)."""
    groups = -(-len(absmax) // GROUP)
    outer = torch.zeros(groups * GROUP, dtype=torch.float32, device=absmax.device)
    outer[:len(absmax)] = absmax
    outer = outer.view(groups, GROUP).amax(1)
    relative = absmax / outer.clamp_min(_TINY).repeat_interleave(GROUP)[:len(absmax)]
    scales = torch.bucketize(relative, _table("cube bounds", absmax.device), out_int32=True).to(torch.uint8)
    scales[_doubly(scales, outer) < _TINY] = 0
    return scales, outer


def _doubly(scales: Tensor, outer: Tensor) -> Tensor:
    cubes = _table("cubes", scales.device).index_select(0, scales.int())
    return cubes.mul_(outer.repeat_interleave(GROUP)[:len(scales)])


def check_settings(owner: str, bits: int, block: int) -> None:
    """Raise `VeneerError` unless a matrix can be encoded so."""
    if isinstance(bits, bool) or bits not in BITS:
        raise VeneerError(f"{owner}: bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    check_positive_int(owner, "block", block)
    if block * bits % 8:
        raise VeneerError(f"{owner}: a block must fill whole bytes, and block={block} at {bits} bits does not; "
                          f"use a multiple of {8 // bits}, such as 64")


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise VeneerError(f"encode: a floating matrix (out, in) is needed, got {tuple(weight.shape)} {weight.dtype}")
    if weight.is_meta:
        raise VeneerError("encode: this weight is on the meta device and has no values yet; load the model first")


def _check_finite(weight: Tensor, absmax: Tensor, block: int) -> None:
    bad = (~absmax.isfinite()).nonzero()
    if not len(bad):
        return
    first = int(bad[0]) * block
    inside = weight.detach().reshape(-1)[first:first + block].float()
    row, column = divmod(first + int((~inside.isfinite()).nonzero()[0]), weight.shape[1])
    raise VeneerError(f"encode: the weight holds {weight[row, column].item()} at ({row}, {column}); NaN, infinite "
                      "values and values beyond fp32 cannot be encoded")

"""Codes of a few bits packed into integers, as GPTQ and AWQ checkpoints have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 (or int16, int8) words along the last dimension → uint8 codes (…, words · width // bits), where width is a
    word's bits: one stream of bits, lowest first, in which a code may begin in one word and end in the next."""
    width = words.element_size() * 8
    mask, period = 2**bits - 1, _period(bits, width)
    count = period * bits // width  # words after which the pattern repeats
    groups = words.unflatten(-1, (-1, count))
    out = torch.empty(*groups.shape[:-1], period, dtype=torch.uint8, device=words.device)
    for i in range(period):
        word, shift = divmod(i * bits, width)
        code = (groups[..., word] >> shift) & mask  # a shift of a negative word brings ones in, which the mask drops
        over = shift + bits - width
        if over > 0:
            code = (code & (mask >> over)) | ((groups[..., word + 1] << (bits - over)) & mask)
        out[..., i] = code
    return out.flatten(-2)


def _period(bits: int, width: int) -> int:
    """Codes after which one ends where a word ends."""
    period = 1
    while period * bits % width:
        period += 1
    return period


def dense(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(code − zero)·scale, in fp32 and rounded once: (out, in).

    codes (in, out), zeros and scales (groups, out); groups: int (in,), the group of each input, or None where inputs
    lie in groups of equal size in their order.
    """
    out, per = codes.shape[1], codes.shape[0] // scales.shape[0]
    values = codes.T.contiguous().float()
    zeros, factors = zeros.T.float(), scales.T.float()
    if groups is None:
        parts = values.view(out, -1, per)
        return parts.sub_(zeros.unsqueeze(-1)).mul_(factors.unsqueeze(-1)).view(out, -1).to(dtype)
    index = groups.long()
    return values.sub_(zeros.index_select(1, index)).mul_(factors.index_select(1, index)).to(dtype)


def refuse_adapter(module: nn.Module) -> str | None:
    """gptqmodel's layers can carry a LoRA of their own, which their forward adds."""
    return None if module.__dict__.get("adapter") is None and module._modules.get("adapter") is None else \
        "this layer carries an adapter of gptqmodel's own; load the model without it"

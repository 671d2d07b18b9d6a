"""The only place where the arithmetic of a linear layer is chosen, and where the choice is explained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.method import VeneerError, nearest
from veneer.ops import reference
from veneer.ops.dropout import Dropped
from veneer.ops.fused import FusedLinear
from veneer.ops.term import Term

_MODES = ("auto", "reference")
_mode = "auto"


class Choice(NamedTuple):
    """`op` is "fused" or "reference"; `why` is a sentence for a person."""

    op: str
    why: str


@contextlib.contextmanager
def use(mode: str) -> Iterator[None]:
    """Inside the context, `"reference"` runs the plain differentiable operations; `"auto"` is the default."""
    global _mode
    if mode not in _MODES:
        raise VeneerError(f"unknown op mode {mode!r}{nearest(mode, _MODES)} Known: {', '.join(_MODES)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def choose(x: Tensor | None, weight: Tensor, terms: Sequence[Term]) -> Choice:
    """Which op runs these terms over this weight; `x` may be None when only an explanation is wanted."""
    if _mode == "reference":
        return Choice("reference", "asked for by veneer.ops.use('reference')")
    if torch.compiler.is_compiling():
        return Choice("reference", "torch.compile fuses the plain operations itself")
    if not weight.is_floating_point() or weight.is_meta:
        return Choice("reference", f"the weight is {weight.dtype} on {weight.device}")
    gains = sum(term.gain is not None for term in terms)
    if gains and len(terms) > 1:
        return Choice("reference", "several live adapters, one of them with a row gain (DoRA)")
    if gains and terms[0].rows is not None:
        return Choice("reference", "a row gain (DoRA) for some rows of the batch only")
    if len({term.dropout for term in terms}) > 1:
        return Choice("reference", "live adapters with different dropout")
    if x is not None and x.dtype != weight.dtype and not _autocasts(x, weight):
        return Choice("reference", f"the input is {x.dtype} and the weight {weight.dtype}")
    return Choice("fused", "one product accumulates on the other" if len(terms) == 1
                  else f"{len(terms)} adapters concatenated into one call")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """x (…, in) through weight (out, in), bias (out,) and the terms → (…, out)."""
    if choose(x, weight, terms).op == "reference":
        return reference.linear(x, weight, bias, terms)
    device = x.device.type
    if not _autocasts(x, weight):
        return _fused(x, weight, bias, terms)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _fused(x, weight, bias, terms)


def _autocasts(x: Tensor, weight: Tensor) -> bool:
    """Autocast is on and would cast both; it leaves fp64 alone."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    p = terms[0].dropout
    flat = x.reshape(-1, x.shape[-1])
    dropped = Dropped(p, flat.shape, flat.device) if p else None
    A, B, scale = terms[0].A, terms[0].B, terms[0].scale
    if len(terms) > 1:
        A, scale = torch.cat([t.A for t in terms]), 1.0
        B = torch.cat([t.B * t.scale for t in terms], dim=1)
    if dropped is not None:
        scale *= dropped.scale
    for term in terms:
        if term.bias is not None and term.rows is None:
            bias = term.bias.to(x.dtype) if bias is None else bias + term.bias.to(bias.dtype)
    y = FusedLinear.apply(flat, weight, bias, A, B, terms[0].gain, _row_mask(x, terms), dropped, scale)
    y = y.view(*x.shape[:-1], weight.shape[0])
    for term in terms:
        if term.bias is not None and term.rows is not None:
            y = y + term.bias.to(y.dtype) * reference.row_factor(term.rows, y)
    return y


def _row_mask(x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """(m, Σr) of 0/1: which columns of S each row of the flattened input may use."""
    if all(term.rows is None for term in terms):
        return None
    batch = next(term.rows for term in terms if term.rows is not None).shape[0]
    columns = []
    for term in terms:
        rows = torch.ones(batch, device=x.device) if term.rows is None else term.rows
        columns.append(rows.to(x.dtype).unsqueeze(1).expand(batch, term.A.shape[0]))
    mask = torch.cat(columns, dim=1)
    return mask.repeat_interleave(x.shape[:-1].numel() // batch, dim=0)

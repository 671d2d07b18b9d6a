"""The only place where the arithmetic of a linear layer is chosen, and where the choice is explained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.forms import Factors, Kronecker
from veneer.method import VeneerError, nearest
from veneer.ops import reference
from veneer.ops.dropout import Dropped
from veneer.ops.fused import FusedLinear
from veneer.ops.sides import Dense, LowRank, Product, Run, Side
from veneer.ops.term import Term

#: below this rank the products are cheap, and W' is not worth its memory
_SPREAD_FROM = 64

_MODES = ("auto", "reference")
_mode = "auto"


class Choice(NamedTuple):
    """`op` is "fused", "dense" (fused, with ΔW spread out once) or "reference"; `why` is a sentence for a person."""

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


def choose(x: Tensor | None, weight: Tensor, terms: Sequence[Term], packed: bool = False) -> Choice:
    """Which op runs these terms over this weight; `x` may be None when only an explanation is wanted.

    packed: the weight is read for this call only, and nothing of its size is to be kept.
    """
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
    if any(term.out_dropout for term in terms) and (len(terms) > 1 or isinstance(terms[0].form, Kronecker)):
        return Choice("reference", "dropout on the output of an adapter that is a Kronecker product or not alone")
    if any(isinstance(term.form, Kronecker) for term in terms):
        if len(terms) > 1:
            return Choice("reference", "several live adapters, one of them a Kronecker product")
        if terms[0].keep is not None and terms[0].keep.numel() > 1:
            return Choice("reference", "outputs of a Kronecker product are dropped one by one")
    if x is not None and x.dtype != weight.dtype and not _autocasts(x, weight):
        return Choice("reference", f"the input is {x.dtype} and the weight {weight.dtype}")
    if x is not None and len(terms) == 1 and not packed and _spreads(x, weight, terms[0]):
        return Choice("dense", f"a rank of {_rank(terms[0])} costs more per row than W + ΔW does once")
    return Choice("fused", "one product accumulates on the other" if len(terms) == 1
                  else f"{len(terms)} adapters concatenated into one call")


def _rank(term: Term) -> int:
    return term.form.A.shape[0] if isinstance(term.form, Factors) else 0


def _spreads(x: Tensor, weight: Tensor, term: Term) -> bool:
    """Whether W' = W + ΔW, made once, costs fewer multiplications than the low-rank products of every row.

    Only in fp32 and wider: in 16 bit W' would round away a ΔW that the products keep.
    """
    if not isinstance(term.form, Factors) or term.rows is not None or x.dtype.itemsize < 4:
        return False
    if term.dropout or term.out_dropout:
        return False
    form = term.form
    rank, rows, (out, in_) = _rank(term), x.shape[:-1].numel(), weight.shape
    if rank < max(_SPREAD_FROM, min(out, in_) // 2):
        return False
    right = any(t is not None and t.requires_grad for t in (form.A, form.mid))
    left = any(t is not None and t.requires_grad for t in (form.B, form.out))
    trains, again = torch.is_grad_enabled() and (left or right), torch.is_grad_enabled() and left
    products = rows * rank * (in_ + out) * (2 if torch.is_grad_enabled() else 1)
    once = out * in_ * rank + rows * rank * (out * trains + in_ * again)
    return once < products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term],
           again: Callable[[], Tensor] | None = None) -> Tensor:
    """x (…, in) through weight (out, in), bias (out,) and the terms → (…, out).

    again: reads the weight anew in the backward; with it, the fused op keeps no weight from the forward until then.
    """
    op = choose(x, weight, terms, again is not None).op
    if op == "reference":
        return reference.linear(x, weight, bias, terms)
    device = x.device.type
    if not _autocasts(x, weight):
        return _fused(x, weight, bias, terms, op, again)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _fused(x, weight, bias, terms, "fused", again)


def onto(base: Tensor, x: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """What the layer itself made of x, base (…, out) with its bias in it, and the terms beside it, in base's dtype."""
    out = base
    for term in terms:
        out = out + reference.contribution(x, base, bias, term).to(base.dtype)
    return out


def _autocasts(x: Tensor, weight: Tensor) -> bool:
    """Autocast is on and would cast both; it leaves fp64 alone."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term], op: str,
           again: Callable[[], Tensor] | None) -> Tensor:
    p, q = terms[0].dropout, terms[0].out_dropout
    flat = x.reshape(-1, x.shape[-1])
    run = Run(1.0, Dropped(p, flat.shape, flat.device) if p else None, _row_mask(x, terms),
              Dropped(q, torch.Size((len(flat), weight.shape[0])), flat.device) if q else None)
    side: Side
    tensors: tuple[Tensor | None, ...]
    form = terms[0].form
    if isinstance(form, Kronecker):
        side, run.scale = Product, form.scale
        tensors = (form.left if terms[0].keep is None else form.left * terms[0].keep, form.right)
    else:
        pair = _joined(terms)
        side, run.scale, tensors = LowRank, pair.scale, (pair.A, pair.B, pair.mid, pair.out)
        if op == "dense":
            pair = pair.folded()
            side, tensors = Dense, (pair.A, pair.B)
    for dropped in (run.dropped, run.out_dropped):
        if dropped is not None:
            run.scale *= dropped.scale
    for term in terms:
        if term.bias is not None and term.rows is None:
            bias = term.bias.to(x.dtype) if bias is None else bias + term.bias.to(bias.dtype)
    y = FusedLinear.apply(flat, weight, bias, terms[0].gain, side, run, again, *tensors)
    y = y.view(*x.shape[:-1], weight.shape[0])
    for term in terms:
        if term.bias is not None and term.rows is not None:
            y = y + term.bias.to(y.dtype) * reference.row_factor(term.rows, y)
    return y


def _joined(terms: Sequence[Term]) -> Factors:
    """The factors of all terms as one pair."""
    pairs = []
    for term in terms:
        assert isinstance(term.form, Factors)
        pairs.append(term.form if term.keep is None else
                     term.form._replace(B=term.form.B * term.keep.unsqueeze(-1).to(term.form.B.dtype)))
    if len(pairs) == 1:
        return pairs[0]
    folded = [pair.folded() for pair in pairs]
    return Factors(torch.cat([f.A for f in folded]), torch.cat([f.B * f.scale for f in folded], dim=1))


def _row_mask(x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """(m, Σr) of 0/1: which columns of S each row of the flattened input may use; (m, 1) for a Kronecker product."""
    if all(term.rows is None for term in terms):
        return None
    batch = next(term.rows for term in terms if term.rows is not None).shape[0]
    columns = []
    for term in terms:
        rows = torch.ones(batch, device=x.device) if term.rows is None else term.rows
        width = _rank(term) or 1
        columns.append(rows.to(x.dtype).unsqueeze(1).expand(batch, width))
    mask = torch.cat(columns, dim=1)
    return mask.repeat_interleave(x.shape[:-1].numel() // batch, dim=0)

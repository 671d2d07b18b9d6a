"""combine: a new adapter whose ΔW is a weighted sum of the ΔWs of others, as they are or thinned out before.

Everything is defined on ΔW, not on factors: the same ΔW has many pairs of factors, and sums, signs and sizes of their
entries mean something else in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.convert import (
    LoRAReport,
    Piece,
    Rank,
    Source,
    change_of,
    check_rank,
    made,
    not_taken,
    own_dtype,
    piece_of,
    put_new,
    readable,
    size_of,
)
from veneer.low_rank import Change, as_factors, dense, spectrum_of, sum_of, widened
from veneer.method import Adapter, VeneerError, nearest, seeded_generator, without_autocast
from veneer.weights import Weight
from veneer.wrappers import unwrap

_MAJORITY = ("total", "frequency")


class Part(NamedTuple):
    """One adapter's share in one weight of the sum."""

    name: str
    factor: float
    adapter: Adapter
    change: Change
    eps: float


class Thinning(NamedTuple):
    """How a ΔW is thinned out, and how several of them become one."""

    thin: Callable[[Tensor, float, torch.Generator], Tensor]
    join: Callable[[list[Tensor], str], Tensor]


def combine(model: nn.Module, weights: Mapping[str, float], name: str, how: str = "sum", rank: Rank = None, *,
            density: float | None = None, majority_sign: str = "total", seed: int = 0) -> LoRAReport:
    """Make a new LoRA adapter `name` of several adapters of any additive methods: ΔW = Σ weightᵢ · ΔWᵢ.

    weights: adapter → its factor, negative ones included; a weight that an adapter is not on counts as unchanged by
    it. Biases of LoRA(bias=True) are added up in the same way, whatever `how`.
    how: "sum", exact, by factors put side by side and then cut to `rank`; "svd", the same, with a rank to be named;
    "cat", factors side by side and nothing else; or, on the dense ΔW of one weight at a time:
    "magnitude_prune" keeps of each ΔW the share `density` of largest absolute value, then sums;
    "ties" does so too, elects a sign for every entry and takes the mean of those weightᵢ · ΔWᵢ that agree with it and
    are not zero (arXiv:2306.01708); `majority_sign` elects by the sum ("total") or by count ("frequency");
    "dare" drops entries at random, keeping `density` of them divided by it, then sums (arXiv:2311.03099); drawn from
    (seed, adapter, weight) on the CPU; "dare_ties" drops so and then elects.
    rank: as for `to_lora`; None is exact, but refuses where that takes more parameters than the adapters together.

    The new adapter is live and trainable, as after `attach`; the others stay. Raises `VeneerError`, with nothing
    changed, for unknown names and options, a name in use, factors that are all zero, a merged model, and methods whose
    change is not a matrix that is added (DoRA, Full, Rows).
    """
    model = unwrap(model)
    _check(weights, how, rank, density, majority_sign)
    not_taken(model, name, "combine")
    found = readable(model, weights, "combine")
    _check_additive(found)
    groups: dict[str, list[tuple[str, Weight, Adapter]]] = {}
    for source, factor in weights.items():
        for weight, adapter in found[source] if factor else ():
            groups.setdefault(weight.name, []).append((source, weight, adapter))
    order = {weight.name: None for items in found.values() for weight, _ in items}
    pieces = []
    for key in [key for key in order if key in groups]:
        weight = groups[key][0][1]
        with torch.no_grad(), without_autocast(weight.tensor):
            parts = [Part(n, float(weights[n]), a, *change_of(a, w, "combine")) for n, w, a in groups[key]]
            pieces.append(_piece(weight, parts, how, rank, density, majority_sign, seed))
    put_new(model, pieces, name, "combine")
    before = size_of(adapter for items in groups.values() for _, _, adapter in items)
    now = sum(tensor.numel() for piece in pieces for tensor in piece.tensors.values())
    text = " + ".join(f"{factor:g}·{source!r}" for source, factor in weights.items())
    lines = tuple(piece.line for piece in pieces if piece.line is not None)
    return LoRAReport(f"{name!r} = {text} by {how!r}", lines, before, now)


def _piece(weight: Weight, parts: list[Part], how: str, rank: Rank, density: float | None, majority_sign: str,
           seed: int) -> Piece:
    thinning = _THINNING.get(how)
    if thinning is not None:
        assert density is not None
        thinned = [part.factor * thinning.thin(dense(part.change), density,
                                               seeded_generator(f"{seed}/{part.name}/{weight.name}")) for part in parts]
        change: Change = thinning.join(thinned, majority_sign)
    elif how == "cat":
        parts = [part._replace(change=as_factors(part.change)) for part in parts]
        change = sum_of([(part.factor, part.change) for part in parts])
    else:
        change = sum_of([(part.factor, part.change) for part in parts])
    source = _source(parts, change)
    if how != "cat":
        return piece_of(weight, source, rank, "combine")
    pair = as_factors(change)
    return made(weight, source, (pair.scale * pair.B, pair.A), 0.0, spectrum_of(pair).square, "combine")


def _source(parts: list[Part], change: Change) -> Source:
    adapters = [part.adapter for part in parts]
    biases = [part.factor * dense(widened(bias)) for part in parts
              if (bias := part.adapter.bias_delta()) is not None]
    dtype = own_dtype(adapters[0])
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, own_dtype(adapter))
    dropouts = {(adapter.dropout, adapter.dropout_on) for adapter in adapters}
    bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
    return Source(change, max(part.eps for part in parts), dtype, size_of(adapters),
                  " + ".join(str(adapter.method) for adapter in adapters), bias,
                  *(dropouts.pop() if len(dropouts) == 1 else ()))


# -- on ΔW itself -------------------------------------------------------------------------------------------
def _largest(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The share `density` of each matrix's entries that is largest in absolute value, the others zero."""
    flat = delta.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    index = flat.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(flat).scatter(-1, index, flat.gather(-1, index)).view_as(delta)


def _random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and then divided by it."""
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64, device="cpu") < density
    return delta * kept.to(delta.device) / density


def _summed(deltas: list[Tensor], majority_sign: str) -> Tensor:
    return sum(deltas[1:], deltas[0])


def _elected(deltas: list[Tensor], majority_sign: str) -> Tensor:
    """The mean of those entries that have the elected sign; those that are zero do not count."""
    total = _summed(deltas, majority_sign)
    votes = _summed([delta.sign() for delta in deltas], "") if majority_sign == "frequency" else total
    sign = torch.where(votes == 0, total, votes).sign()  # a draw by count goes to the greater sum
    agreeing = [delta * ((delta.sign() == sign) & (sign != 0)) for delta in deltas]
    count = _summed([(delta != 0).to(delta.dtype) for delta in agreeing], "")
    return _summed(agreeing, "") / count.clamp_min(1)


_THINNING = {
    "magnitude_prune": Thinning(_largest, _summed),
    "ties": Thinning(_largest, _elected),
    "dare": Thinning(_random, _summed),
    "dare_ties": Thinning(_random, _elected),
}
_HOW = ("sum", "cat", "svd", *_THINNING)


# -- what is refused ----------------------------------------------------------------------------------------
def _check(weights: Any, how: Any, rank: Any, density: Any, majority_sign: Any) -> None:
    check_rank("combine", rank)
    if not isinstance(weights, Mapping) or not weights:
        raise VeneerError('combine: weights must map adapters to their factors, {"a": 0.7, "b": 0.3}, got '
                          f"{weights!r}")
    for source, factor in weights.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise VeneerError(f"combine: the factor of {source!r} must be a finite number, got {factor!r}")
    if not any(weights.values()):
        raise VeneerError("combine: all factors are zero, so nothing would be left")
    if how not in _HOW:
        raise VeneerError(f"combine: unknown how {how!r}{nearest(str(how), _HOW) or '.'} Known: {', '.join(_HOW)}")
    if how == "svd" and rank is None:
        raise VeneerError("combine: how='svd' cuts the sum to a rank: give one (8), or a share of the squared norm to "
                          "keep (0.99)")
    if how == "cat" and rank is not None:
        raise VeneerError(f"combine: how='cat' keeps all factors; how='sum' cuts to rank={rank!r}")
    _check_thinning(how, density, majority_sign)


def _check_thinning(how: str, density: Any, majority_sign: Any) -> None:
    number = isinstance(density, (int, float)) and not isinstance(density, bool) and 0 < density <= 1
    if how in _THINNING and not number:
        raise VeneerError(f"combine: how={how!r} needs the share of entries to keep, density above 0 and up to 1, got "
                          f"{density!r}")
    if how not in _THINNING and density is not None:
        raise VeneerError(f"combine: density is for {', '.join(_THINNING)}; how={how!r} keeps every entry")
    if majority_sign not in _MAJORITY:
        hint = nearest(str(majority_sign), _MAJORITY) or "."
        raise VeneerError(f"combine: unknown majority_sign {majority_sign!r}{hint} Known: {', '.join(_MAJORITY)}")


def _check_additive(found: Mapping[str, list[tuple[Weight, Adapter]]]) -> None:
    for name, items in found.items():
        for weight, adapter in items:
            method = adapter.method
            if method is not None and not method.additive:
                raise VeneerError(f"combine: {name!r} has {method} on {weight.name!r}, whose change of W depends on W "
                                  "and cannot be added to others. Make it plain LoRA first: to_lora(model, rank, "
                                  f"name={name!r}, to=..., extract=True); biases and norms trained whole have no low "
                                  "rank and cannot be combined")

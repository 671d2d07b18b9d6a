"""to_lora: any adapter as plain LoRA, exact or of a smaller rank; cutting the rank of a LoRA is the same thing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.attach import adapter_names, attach, attached, detach, hosts, routes
from veneer.io.load import load
from veneer.io.save import SaveReport, save
from veneer.low_rank import Change, moved, rank_for, spectrum_of, widened
from veneer.method import Adapter, Method, VeneerError, nearest, without_autocast
from veneer.methods import DoRA, LoRA
from veneer.plan import Plan, PlanEntry
from veneer.sharding import is_sharded
from veneer.weights import Weight, original, scan
from veneer.wrappers import unwrap

Rank = int | float | str | None
_SHOWN = 10


@dataclass(frozen=True)
class LoRAWeight:
    """One weight as LoRA. was: the method before; full: the highest rank it can have; error: ‖ΔW − s·B·A‖ / ‖ΔW‖
    (Frobenius; what rounding to the adapter's dtype costs included), 0 where ΔW is zero; norm: ‖ΔW‖."""

    name: str
    was: str
    rank: int
    full: int
    error: float
    norm: float


@dataclass(frozen=True)
class LoRAReport:
    """What `to_lora` or `combine` made. left: weights that stayed as they were, with the reason; parameters: of the
    adapter now, parameters_before: of what it was made from; saved: where a file was written."""

    title: str
    weights: tuple[LoRAWeight, ...]
    parameters_before: int
    parameters: int
    left: dict[str, str] = field(default_factory=dict)
    saved: SaveReport | None = None

    @property
    def ranks(self) -> dict[str, int]:
        return {weight.name: weight.rank for weight in self.weights}

    @property
    def errors(self) -> dict[str, float]:
        return {weight.name: weight.error for weight in self.weights}

    @property
    def error(self) -> float:
        """The error of all weights together, each counting by the square of its norm."""
        total = math.hypot(*(weight.norm for weight in self.weights))
        return math.hypot(*(weight.error * weight.norm for weight in self.weights)) / total if total else 0.0

    def __str__(self) -> str:
        ranks = sorted(self.ranks.values())
        span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"{self.title}: {len(self.weights)} weights of {span}, {self.parameters:,} parameters "
                 f"(before: {self.parameters_before:,}), relative error {self.error:.2g}"]
        lines += self._table()
        full = sum(weight.rank == weight.full for weight in self.weights)
        if full:
            lines.append(f"of full rank: {full}")
        left = [f"{name} is {why}" for name, why in self.left.items()]
        lines += [f"left as it was: {text}" for text in left[:_SHOWN]]
        lines += [f"… and {len(left) - _SHOWN} more"] if len(left) > _SHOWN else []
        return "\n".join(lines + ([str(self.saved)] if self.saved else []))

    def _table(self) -> list[str]:
        worst = sorted(self.weights, key=lambda weight: -weight.error)
        rows = [("weight", "was", "rank", "error")]
        rows += [(w.name, w.was, f"{w.rank} of {w.full}", f"{w.error:.2g}") for w in worst[:_SHOWN]]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  " + "  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        return lines + ([f"  … and {len(worst) - _SHOWN} more, none worse"] if len(worst) > _SHOWN else [])


def to_lora(model_or_path: nn.Module | str | Path, rank: Rank = None, *, name: str = "default", to: str | None = None,
            extract: bool = False, model: nn.Module | None = None, output: str | Path | None = None) -> LoRAReport:
    """Turn an adapter into plain LoRA (`DoRA(x)` into `DoRA(LoRA)`), or cut the rank of one that is LoRA already.

    rank: an int is the most it may be (the nearest matrix of that rank, by SVD, and never more than is exact); a
    float between 0 and 1 keeps, weight by weight, the smallest rank with at least that share of ‖ΔW‖²; "exact" the
    smallest rank without an error; None the same, but refuses where that is the full rank of a weight and would take
    more parameters than the adapter has. A LoRA whose rank would not shrink keeps its bits.
    A model: the adapter `name` is replaced, as live and as trainable as before; its parameters are new ones, for a new
    optimizer. With `to` it stays, and the result is a new adapter of that name, the live one, as after `attach`.
    A path: the adapter there is converted on `model` and written to `output`; the model is left as it was.
    extract: what is not additive (Full, Rows, DoRA) is converted too, as its new weight minus the base's; otherwise
    Full and Rows stay as they are.

    ΔW is computed whole only where a method gives no form of it, one weight at a time. Raises `VeneerError`, with
    nothing changed, for an unknown name, a bad rank, a merged, sharded or meta-device adapter, NaN in it, or nothing
    to convert.
    """
    check_rank("to_lora", rank)
    if not isinstance(model_or_path, nn.Module):
        return _file(Path(model_or_path), rank, extract, model, output, to)
    if model is not None or output is not None:
        raise VeneerError("to_lora: model and output go with a path; a model's own adapter is converted in place: "
                          "to_lora(model, name=...), then save(model, path)")
    return _on_model(unwrap(model_or_path), rank, name, to, extract)


def check_rank(doing: str, rank: Any) -> None:
    """Raise `VeneerError` unless `rank` is None, "exact", an int of at least 1 or a float between 0 and 1."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (rank is None or rank == "exact" or whole or share):
        hint = nearest(rank, ["exact"]) if isinstance(rank, str) else ""
        raise VeneerError(f"{doing}: rank must be a whole number of at least 1, a share of the squared norm above 0 "
                          f'and below 1, "exact" or None, got {rank!r}{hint}')


def readable(model: nn.Module, names: Iterable[str], doing: str) -> dict[str, list[tuple[Weight, Adapter]]]:
    """The adapters of these names by name; `VeneerError` where one is unknown or has no values of its own to read."""
    present = adapter_names(model)
    merged = sorted({name for _, host in hosts(model) for name in host.veneer.merged})
    if merged:
        raise VeneerError(f"{doing}: adapter {', '.join(map(repr, merged))} is merged into the base weights; call "
                          "veneer.unmerge(model) first")
    found: dict[str, list[tuple[Weight, Adapter]]] = {}
    for name in names:
        if name not in present:
            raise VeneerError(f"{doing}: no adapter named {name!r} on this model{nearest(str(name), present) or '.'} "
                              f"It has: {', '.join(map(repr, present)) or 'none'}")
        found[name] = [(weight, adapter) for weight, adapter in attached(model, name)]
        for weight, adapter in found[name]:
            if adapter.on_meta():
                raise VeneerError(f"{doing}: the adapter of {weight.name!r} is on the meta device and has no values "
                                  "yet; call model.to_empty(device=...) and load the base weights first")
            if any(map(is_sharded, adapter.parameters())):
                raise VeneerError(f"{doing}: the adapter of {weight.name!r} is sharded over processes; save it (every "
                                  "process must call save), and load it onto a model that is not sharded")
    return found


class Source(NamedTuple):
    """What a LoRA is to be made from: ΔW, and what else it takes over."""

    change: Change
    #: eps of the arithmetic that ΔW comes from
    eps: float
    dtype: torch.dtype
    parameters: int
    was: str
    bias: Tensor | None = None
    dropout: float = 0.0
    dropout_on: str = "input"


class Piece(NamedTuple):
    """One weight of the adapter to be: a method, and the tensors its adapter takes. line: None where it is kept."""

    weight: Weight
    method: Method
    tensors: dict[str, Tensor]
    line: LoRAWeight | None = None


def noise(*tensors: Tensor) -> float:
    """eps of the arithmetic these tensors come from. 16-bit numbers are exact ones, to be kept to fp32's precision."""
    return max(min(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps) for tensor in tensors)


def change_of(adapter: Adapter, weight: Weight, doing: str) -> tuple[Change, float]:
    """ΔW of an additive adapter, widened, and the eps of its arithmetic; `VeneerError` where it is not finite."""
    change: Change | None = adapter.form()
    if change is None:
        change = adapter.delta()
    tensors = [change] if isinstance(change, Tensor) else [part for part in change if isinstance(part, Tensor)]
    _check_finite(tensors, weight, doing)
    return widened(change), noise(*tensors)


def _check_finite(tensors: Iterable[Tensor], weight: Weight, doing: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise VeneerError(f"{doing}: the adapter of {weight.name!r} holds NaN or infinite values; nothing was changed")


def own_dtype(adapter: Adapter) -> torch.dtype:
    """The dtype of an adapter's parameters, the widest where they differ."""
    found = [param.dtype for param in adapter.parameters()]
    wide = found[0]
    for dtype in found[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide


def size_of(adapters: Iterable[Adapter]) -> int:
    """The parameters of adapters, each once."""
    return sum({id(p): p.numel() for adapter in adapters for p in adapter.parameters()}.values())


def piece_of(weight: Weight, source: Source, rank: Rank, doing: str) -> Piece:
    """The nearest LoRA of the rank that is wanted. Raises `VeneerError` where None is wanted and costs too much."""
    shape = weight.layout.shape
    spectrum = spectrum_of(source.change, rank if isinstance(rank, int) else None)
    chosen, full = rank_for(spectrum, rank, source.eps), min(shape.out, shape.in_)
    size = chosen * (shape.out + shape.in_) * math.prod(shape.batch)
    if rank is None and chosen == full and size > source.parameters:
        raise VeneerError(f"{doing}: the change of {weight.name!r} by {source.was} has the full rank {full}, so that "
                          f"an exact LoRA would hold {size:,} parameters, more than the {source.parameters:,} of now. "
                          'Give a rank (8), a share of the squared norm to keep (0.99), or rank="exact" for that')
    return made(weight, source, spectrum.pair(chosen), spectrum.tails()[chosen], spectrum.square, doing)


def made(weight: Weight, source: Source, pair: tuple[Tensor, Tensor], tail: float, square: float,
         doing: str) -> Piece:
    """LoRA of a pair B, A of a scale of 1. tail: what the pair leaves out of `square` = ‖ΔW‖²."""
    shape = weight.layout.shape
    B, A = (tensor.to(source.dtype) for tensor in pair)
    if not (B.isfinite().all() and A.isfinite().all()):
        raise VeneerError(f"{doing}: factors of the change of {weight.name!r} are too large for {source.dtype}; "
                          "nothing was changed")
    default = torch.promote_types(weight.dtype, torch.float32)
    method = LoRA(rank=A.shape[-2], dropout=source.dropout, dropout_on=source.dropout_on, bias=source.bias is not None,
                  dtype=None if source.dtype == default else source.dtype)
    error = math.sqrt((tail + moved(pair, (B, A))) / square) if square else 0.0
    line = LoRAWeight(weight.name, source.was, A.shape[-2], min(shape.out, shape.in_), error, math.sqrt(square))
    tensors = {"A": A, "B": B, **({} if source.bias is None else {"bias": source.bias.detach()})}
    return Piece(weight, method, tensors, line)


def put_new(model: nn.Module, pieces: list[Piece], name: str, rule: str) -> None:
    """The pieces as a new adapter, live and trainable as after `attach`."""
    base = sum(weight.numel() for weight in scan(model))
    entries = [PlanEntry(piece.weight, piece.method, rule, sum(t.numel() for t in piece.tensors.values()), given=True)
               for piece in pieces]
    attach(model, Plan(entries, base), name)
    tensors = {piece.weight.name: piece.tensors for piece in pieces}
    with torch.no_grad():
        for weight, adapter in attached(model, name):
            adapter.unpack(tensors[weight.name])


def not_taken(model: nn.Module, name: str, doing: str) -> None:
    """Refuse a name in use before the work is done."""
    if name in adapter_names(model):
        raise VeneerError(f"{doing}: this model already has an adapter {name!r}; detach(model, {name!r}) first, or "
                          "give the new one another name")


@torch.no_grad()
def converted(model: nn.Module, name: str, rank: Rank, extract: bool = False) -> tuple[list[Piece], dict[str, str]]:
    """What `to_lora` makes of the adapter `name`, one piece for each of its weights in their order, and why some are
    left as they are; nothing is changed."""
    left: dict[str, str] = {}
    pieces = []
    for weight, adapter in readable(model, [name], "to_lora")[name]:
        why = _reason_to_leave(weight, adapter, extract)
        if why is None:
            with without_autocast(weight.tensor):
                pieces.append(_converted(weight, adapter, rank, extract))
        else:
            assert adapter.method is not None
            left[weight.name] = why
            pieces.append(_kept(weight, adapter, adapter.method))
    if all(piece.line is None for piece in pieces):
        raise VeneerError(f"to_lora: nothing to convert in {name!r}: "
                          + "; ".join(f"{weight!r} is {why}" for weight, why in list(left.items())[:3]))
    return pieces, left


@torch.no_grad()
def _on_model(model: nn.Module, rank: Rank, name: str, to: str | None, extract: bool) -> LoRAReport:
    found = readable(model, [name], "to_lora")[name]
    if to is None:
        _only_here(model, name)
    else:
        not_taken(model, to, "to_lora")
    pieces, left = converted(model, name, rank, extract)
    lines = tuple(piece.line for piece in pieces if piece.line is not None)
    before = size_of(adapter for _, adapter in found)
    if to is None:
        _replace(name, found, pieces)
    else:
        put_new(model, pieces, to, "to_lora")
    title = f"{name!r} as LoRA" + (f", {to!r}" if to else "")
    now = size_of(item.adapter for item in attached(model, to or name))
    return LoRAReport(title, lines, before, now, left)


def _reason_to_leave(weight: Weight, adapter: Adapter, extract: bool) -> str | None:
    method = adapter.method
    assert method is not None
    if method.additive or (isinstance(method, DoRA) and not extract):
        return None
    why = LoRA().refusal(weight.layout.shape)
    if why is not None:
        return f"{method}: {why.partition(';')[0]}"
    if original(weight) is None or weight.tensor.is_meta:
        return f"{method}: the base weight that it starts from is not there"
    return None if extract else f"{method}: not a change that is added; extract=True takes it for one"


def _kept(weight: Weight, adapter: Adapter, method: Method) -> Piece:
    return Piece(weight, method, {key: tensor.detach() for key, tensor in adapter.packed().items()})


def _converted(weight: Weight, adapter: Adapter, rank: Rank, extract: bool) -> Piece:
    method = adapter.method
    assert method is not None
    if isinstance(method, DoRA) and not extract:
        inner: Any = adapter.inner
        piece = _additive(weight, inner, method.inner, rank)
        tensors = {f"inner.{key}": tensor for key, tensor in piece.tensors.items()}
        line = None if piece.line is None else dataclasses.replace(piece.line, was=str(method))
        return Piece(weight, DoRA(piece.method), {"magnitude": adapter.get_parameter("magnitude"), **tensors}, line)
    if method.additive:
        return _additive(weight, adapter, method, rank)
    base = original(weight)
    assert base is not None
    matrix = widened(weight.layout.matrix(base.to(weight.tensor.device)))
    assert isinstance(matrix, Tensor)
    change = adapter.new_weight(matrix).to(matrix.dtype) - matrix
    _check_finite([change], weight, "to_lora")
    source = Source(change, noise(*adapter.parameters()), own_dtype(adapter), size_of([adapter]), str(method),
                    adapter.bias_delta(), adapter.dropout, adapter.dropout_on)
    return piece_of(weight, source, rank, "to_lora")


def _additive(weight: Weight, adapter: Adapter, method: Method, rank: Rank) -> Piece:
    change, eps = change_of(adapter, weight, "to_lora")
    source = Source(change, eps, own_dtype(adapter), size_of([adapter]), str(method), adapter.bias_delta(),
                    adapter.dropout, adapter.dropout_on)
    piece = piece_of(weight, source, rank, "to_lora")
    assert piece.line is not None
    own = adapter.packed()
    plain, tensors = (method, own) if method.moves_base else method.plain(own)
    if isinstance(plain, LoRA) and piece.line.rank >= plain.rank:
        line = dataclasses.replace(piece.line, rank=plain.rank, error=0.0)
        return Piece(weight, plain, {key: tensor.detach() for key, tensor in tensors.items()}, line)
    return piece


def _only_here(model: nn.Module, name: str) -> None:
    """Refuse a part of a model whose adapters, or what these share, are used outside of it too."""
    inside = {id(host): at for at, host in hosts(model)}
    mine = {id(part): at for at, host in hosts(model) if name in host.adapters for part in _parts(host, name)}
    for route in routes(model):
        for host in route.hosts:
            if id(host) in inside or name not in host.adapters:  # type: ignore[operator]
                continue
            for part in _parts(host, name):
                if id(part) in mine:
                    raise VeneerError(f"to_lora: the adapter {name!r} of {mine[id(part)] or 'this module'!r} is also "
                                      "used outside the part of the model given; call this on the whole model")


def _parts(host: Any, name: str) -> list[nn.Module]:
    adapters = [part for part in host.adapters[name].modules() if isinstance(part, Adapter)]
    return [*adapters, *(state for a in adapters if (state := a.shared_state()) is not None)]


def _replace(name: str, found: list[tuple[Weight, Adapter]], pieces: list[Piece]) -> None:
    """Put the pieces that changed in the place of the adapters they were made from."""
    for (weight, old), piece in zip(found, pieces, strict=True):
        if piece.line is None or piece.method == old.method:
            continue
        with torch.device(weight.tensor.device):
            new = piece.method.build(weight.layout.shape, torch.promote_types(weight.dtype, torch.float32))
        new.unpack(piece.tensors)
        new.method, new.seed_key = piece.method, old.seed_key
        trained = {key: param.requires_grad for key, param in old.named_parameters()}
        for key, param in new.named_parameters():
            param.requires_grad_(trained.get(key, any(trained.values())))
        new.train(old.training)
        for place in weight.places:
            host: Any = place.module
            host.adapters[name][place.param] = new


def _file(path: Path, rank: Rank, extract: bool, model: nn.Module | None, output: str | Path | None,
          to: str | None) -> LoRAReport:
    if model is None or output is None:
        raise VeneerError("to_lora: a file says neither what kind of layer a weight belongs to nor how it is laid "
                          "out: give the base model and where to write, to_lora(path, model=model, output=...), or "
                          "load it and call to_lora(model)")
    if to is not None:
        raise VeneerError("to_lora: `to` names an adapter on a model; a path's result is written to `output`")
    model = unwrap(model)
    taken = adapter_names(model)
    name = next(f"converted{i}" for i in range(len(taken) + 1) if f"converted{i}" not in taken)
    live = [(route, route.live) for route in routes(model)]
    load(model, path, name=name)
    try:
        report = _on_model(model, rank, name, None, extract)
        saved = save(model, output, name=name)
    finally:
        detach(model, name)
        for route, names in live:
            route.live = names
    return dataclasses.replace(report, title=f"{path} as LoRA", saved=saved)

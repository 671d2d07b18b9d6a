"""What every host shares: its adapters, its state, and the weight-space definition.

A host is a mixin that is laid over a module's own class. It knows how a weight is applied, never which
method adapts it.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.forms import Form
from veneer.method import Adapter, Shape, VeneerError, VeneerWarning, without_autocast
from veneer.ops import Term
from veneer.route import Route
from veneer.storage import dense
from veneer.storage.requantise import Requantised


@dataclass(frozen=True)
class Layout:
    """How a stored weight is seen as the matrix (*batch, out, in) that methods work on."""

    shape: Shape
    native: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def of(cls, weight: Tensor, *, transposed: bool = False, kernel: Sequence[int] = (),
           lookup: bool = False) -> Layout:
        """The layout of a stored weight: vector, matrix (out, in), experts (E, out, in), convolution."""
        size = tuple(weight.shape)
        if len(size) <= 1:
            shape = Shape(out=weight.numel(), in_=1, is_vector=True)
        elif kernel or len(size) > 3:
            shape = Shape(out=size[0], in_=weight[0].numel(), kernel=tuple(kernel) or size[2:])
        else:
            rows, columns = (size[-1], size[-2]) if transposed else size[-2:]
            shape = Shape(out=rows, in_=columns, batch=size[:-2], lookup=lookup)
        return cls(shape, size, transposed)

    @classmethod
    def packed(cls, size: tuple[int, int]) -> Layout:
        """The layout of a packed matrix of `size` (out, in), whose stored tensor has a shape of its own."""
        return cls(Shape(out=size[0], in_=size[1]), size)

    def turned(self, other: Layout) -> bool:
        """The same stored tensor is another matrix in `other`; an embedding and a head tied to it agree."""
        same = replace(self.shape, lookup=False) == replace(other.shape, lookup=False)
        return not same or self.transposed != other.transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of the stored weight as (*batch, out, in)."""
        return weight.mT if self.transposed else weight.reshape(self.shape.matrix)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        # Laid out in memory as the stored one is: another order of the same numbers can mean other bits of a product.
        return (matrix.mT.contiguous() if self.transposed else matrix).reshape(self.native)


@dataclass(frozen=True)
class Moved:
    """A base weight that a start has rewritten: which start, and by what the weight as it was is known again
    (`io.fingerprint.Sample`)."""

    start: str
    sample: Any


class HostState:
    """What a host remembers beside its parameters. Plain attributes: it travels with copies and pickles."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.layouts: dict[str, Layout] = {}
        self.merged: tuple[str, ...] = ()
        self.off: set[str] = set()  # adapters that are not live here, whatever the route says
        # The base's own values while merged: a tensor, what a storage holds, or None where there was no such bias.
        self.kept: dict[str, Any] = {}
        self.dense: Tensor | None = None  # the merged weight of a packed layer
        self.input_dtype: torch.dtype | None = None  # of a packed layer's last input
        self.requantised: tuple[float, float] | None = None  # ‖ΔW‖² of one that was packed again, and what was lost
        self.kept_on: torch.device | None = None  # where that one lay
        self.moved: dict[str, Moved] = {}  # parameters of which a start took a part away
        self.shown: dict[str, Tensor] | None = None  # adapted weights, only while this module's forward runs
        self.read: set[str] = set()  # which of them that forward has asked for
        # Routes of forwards since the last backward that recomputed this layer, with and without gradients.
        self.seen: dict[bool, deque[tuple]] = {True: deque(maxlen=8), False: deque(maxlen=8)}
        self.recomputed = False
        self.guards: dict[str, Any] = {}  # what `lift` must call remove() on, see hosts.direct_readers


class Host(nn.Module):
    """Mixin over a module's own class; `adapters` maps name → parameter → adapter."""

    adapters: nn.ModuleDict
    veneer: HostState
    #: the layer's input reaches the adapter, so that dropout on it means something
    has_input: ClassVar[bool] = True
    #: an adapter may add to the layer's output channels
    has_bias: ClassVar[bool] = True
    #: the layer looks up rows of its weight, so that its outputs are columns
    lookup: ClassVar[bool] = False
    #: counts as a linear weight for a rule that is a bare method
    is_linear: ClassVar[bool] = False

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        """The parameters of `module` that this host applies itself, or an empty dict when it is not of its kind.

        kind: the module's own class, below any host that lies on it already.
        """
        raise NotImplementedError

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this module cannot be adapted although it is of this host's kind, or None."""
        return None

    # -- which adapters ---------------------------------------------------------------------------------
    def route_now(self) -> Route:
        """The route in force; refuses a recomputation under another route than the forward had."""
        if not torch.compiler.is_compiling():
            self._watch_recompute(self.veneer)
        return self.veneer.route

    def _watch_recompute(self, state: HostState) -> None:
        signature = (state.route.signature, frozenset(state.off))
        if torch._C._current_graph_task_id() == -1:  # an ordinary forward
            if state.recomputed:
                state.seen[True].clear()
                state.seen[False].clear()
                state.recomputed = False
            seen = state.seen[torch.is_grad_enabled()]
            if signature not in seen:
                seen.append(signature)
            return
        state.recomputed = True
        # Reentrant checkpointing runs its forward without gradients, like a forward that is only looked at.
        seen = state.seen[True] or state.seen[False]
        if any(other != signature for other in state.seen[True]) or (seen and signature not in seen):
            raise VeneerError(
                "gradient checkpointing recomputes this layer in the backward pass, but other adapters were live in "
                "a forward pass since the last one: call backward() inside the same `with veneer.route(...)` or "
                "`with veneer.disabled(...)` as its forward, before the next forward under another, and run "
                "forwards that need no gradient under torch.no_grad()")
        if len(seen) > 1:
            warnings.warn("reentrant gradient checkpointing under several routes: what is recomputed now runs with the "
                          "adapters that are live now; use_reentrant=False would let this be checked", VeneerWarning,
                          stacklevel=2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.veneer.route.hosts.add(self)

    def live(self, param: str, names: Sequence[str | None] | None = None) -> list[Adapter]:
        """The adapters of one parameter among `names` (default: the route's live ones), merged ones left out."""
        state = self.veneer
        if names is None:
            names = () if state.route.disabled else state.route.live
        found = []
        for name in names:
            if name is None or name in state.merged or name in state.off or name not in self.adapters:
                continue
            slots = self.adapters[name]
            if param in slots:  # type: ignore[operator]
                adapter = slots[param]  # type: ignore[index]
                if adapter.pending:
                    self.finish(param, adapter)
                found.append(adapter)
        return found

    def finish(self, param: str, adapter: Adapter) -> None:
        """Give an adapter that was attached on the meta device the weight it starts from."""
        weight = self.base_matrix(param)
        if weight.is_meta or adapter.on_meta():
            return
        with torch.no_grad(), without_autocast(weight):
            moved = adapter.start(weight)
        if moved is not None:
            raise VeneerError(f"the start of {adapter.method} moves a part of the base weight into the adapter, which "
                              "cannot be done after the attach: load the base weights first, then attach")
        adapter.pending, adapter.evidence = False, None

    def requantised(self, param: str, adapters: Sequence[Adapter]) -> Requantised | None:
        """A packed weight with these adapters in it, packed again, for `write`; None for a parameter that is none."""
        return None

    def write(self, param: str, value: Tensor | Requantised, keep: bool) -> None:
        """Put a merged value (stored layout) over the base's own, which is kept for `restore` where asked for."""
        assert isinstance(value, Tensor)
        stored = self._parameters.get(param)
        before: Tensor | None = None
        if stored is None:  # an adapter's bias on a layer that had none
            self.register_parameter(param, nn.Parameter(value, requires_grad=False))
        else:
            before = dense.swap(stored, value)
        if keep:
            self.veneer.kept[param] = before

    def unrestorable(self) -> str | None:
        """Why the base's own values, which were kept, cannot be put back now, or None."""
        return None

    def restore(self, param: str) -> None:
        """Give the base its own value back."""
        before, stored = self.veneer.kept.pop(param), self._parameters[param]
        assert stored is not None
        if before is None:
            self.register_parameter(param, None)
        else:
            dense.swap(stored, before.to(stored.device, stored.dtype))

    # -- the definition ---------------------------------------------------------------------------------
    def base_weight(self, param: str) -> Tensor:
        """The stored base weight, as dense numbers."""
        return dense.stored(self, param)

    def carrier(self, param: str) -> Tensor | None:
        """The tensor that holds a parameter, packed or not; None where the layer has no such parameter."""
        return self._parameters.get(param)

    def weight_dtype(self, param: str) -> torch.dtype:
        """What `base_weight` gives, without reading it."""
        return dense.stored(self, param).dtype

    def base_matrix(self, param: str) -> Tensor:
        """The base weight as (*batch, out, in)."""
        return self.veneer.layouts[param].matrix(self.base_weight(param))

    def adapted_weight(self, param: str, adapters: Sequence[Adapter], wide: bool = False,
                       dropping: bool = False, base: Tensor | None = None) -> Tensor:
        """W + Σ (new_weight_i(W) − W) in the stored layout; `wide` computes and returns fp32 or wider; `dropping`
        draws what is dropped of each ΔW in a training forward; `base`: W, where it was read already."""
        base = self.base_matrix(param) if base is None else self.veneer.layouts[param].matrix(base)
        dtype = base.dtype
        if wide:
            dtype = torch.promote_types(dtype, torch.float32)
            base = base.to(dtype)
        news = [_new_weight(adapter, base, dropping) for adapter in adapters]
        new = news[0] if len(news) == 1 else base + sum(each - base for each in news)
        return self.veneer.layouts[param].stored(new.to(dtype))

    def adapted_bias(self, names: Sequence[str | None] | None = None) -> Tensor | None:
        """The layer's bias with the adapters of that parameter applied, or the bias itself."""
        adapters = self.live("bias", names) if "bias" in self.veneer.layouts else []
        if not adapters:
            return self._parameters.get("bias")
        return self.adapted_weight("bias", adapters, dropping=self.training)

    def added_bias(self, names: Sequence[str | None]) -> Tensor | None:
        """What the weight's adapters add to the layer's bias (out,), in fp32 or wider, or None."""
        deltas = [a.bias_delta() for a in self.live("weight", names)] if "weight" in self.veneer.layouts else []
        found = [d.to(torch.promote_types(d.dtype, torch.float32)) for d in deltas if d is not None]
        return torch.stack(found).sum(0) if found else None

    def explain(self, param: str) -> tuple[str, str]:
        """The path that parameter `param` takes under the route in force, and why."""
        state = self.veneer
        if state.merged:
            return "merged", f"{', '.join(state.merged)} written over the base weight"
        if state.route.disabled:
            return "base", "inside disabled()"
        adapters = self.live(param, state.route.rows.distinct if state.route.rows else None)
        return self.explain_live(param, adapters) if adapters else ("base", "no live adapter")

    def explain_live(self, param: str, adapters: Sequence[Adapter]) -> tuple[str, str]:
        return "weight space", "the module's own forward reads the weight"

    def become(self, base: type[nn.Module], host: type[Host]) -> None:
        """Go on as `host` over another class of module; set by `hosts.swap`, which makes the classes."""
        raise NotImplementedError

    # -- terms ------------------------------------------------------------------------------------------
    def usable(self, form: Form) -> bool:
        """Whether this layer can apply a change by its form, without the dense weight."""
        return True

    def term(self, adapter: Adapter, weight: Tensor, rows: Tensor | None = None) -> Term | None:
        """The adapter as a term of the ops, or None when it has no form that this layer can use.

        weight: the base matrix; one on the meta device will do for an adapter that does not read it.
        """
        form = adapter.form(weight.dtype)
        if form is None or not self.usable(form):
            return None
        gain = adapter.gain(weight, form)
        # A factor for an embedding's columns is none for the outputs of the head tied to it.
        astray = adapter.shape.lookup != self.lookup
        keep = adapter.keep() if self.training else None
        if astray and (gain is not None or (keep is not None and keep.numel() > 1)):
            return None
        rate = adapter.dropout if self.training else 0.0
        dropout, out_dropout = (rate, 0.0) if adapter.dropout_on == "input" else (0.0, rate)
        return Term(form, dropout, gain, adapter.bias_delta(), rows, keep, out_dropout)


def _new_weight(adapter: Adapter, base: Tensor, dropping: bool) -> Tensor:
    keep = adapter.keep() if dropping else None
    return adapter.new_weight(base) if keep is None else adapter.dropped_weight(base, keep)


def check_rows(route: Route, size: int) -> None:
    """A routed batch must hold a whole number of input rows for each name."""
    rows = len(route.rows.names) if route.rows is not None else 1
    if size % rows:
        raise VeneerError(f"route() was given {rows} names, but a layer sees a batch of {size}: give one name "
                          "(or None) per row of the batch")

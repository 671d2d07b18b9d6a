"""DoRA: W' = (m / ‖W + ΔW‖_row) ∘ (W + ΔW), a trained length for every output (Liu et al. 2024,
arXiv:2402.09353), around any additive method. Outputs are the rows of W, but the columns of an embedding.

The norm is a constant for the gradient (§4.3 of the paper). Where ΔW has a form it is never spread out for the norm:
‖W + ΔW‖² = ‖W‖² + what `added_square` of the form gives. ‖W‖² is kept; sums are in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.forms import Form
from veneer.method import (
    Adapter,
    Method,
    Need,
    NewBase,
    Shape,
    Shared,
    VeneerError,
    method_from_dict,
    register,
    without_autocast,
)
from veneer.methods.lengths import kept_squares
from veneer.stamp import Stamp


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """Give the outputs of an additive method's result a trained length; starts at the base's own."""
    additive = False
    inner: Method

    def __init__(self, inner: Method) -> None:
        if not isinstance(inner, Method):
            raise VeneerError(f"DoRA wraps a method: DoRA(LoRA(rank=8)); got {inner!r}")
        if not inner.additive:
            raise VeneerError(f"DoRA wraps an additive method such as LoRA; {type(inner).__name__} is not one")
        object.__setattr__(self, "inner", inner)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """Options without `inner` are those of an inner LoRA: `{"method": "dora", "rank": 8}`."""
        if "inner" in options:
            return super().from_options(options)
        return cls(method_from_dict({"method": "lora", **options}))

    def settle(self, shapes: Mapping[str, Shape]) -> Method:
        return DoRA(self.inner.settle(shapes))

    def scheduled(self, steps: int) -> Method:
        return DoRA(self.inner.scheduled(steps))

    def shared(self, dtype: torch.dtype) -> Shared | None:
        return self.inner.shared(dtype)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> DoRAAdapter:
        return DoRAAdapter(self.inner.build(shape, dtype, shared), shape, dtype)

    @property
    def uses_input(self) -> bool:
        return self.inner.uses_input

    @property
    def adds_bias(self) -> bool:
        return self.inner.adds_bias

    @property
    def needs(self) -> str | None:
        return self.inner.needs

    @property
    def need(self) -> Need | None:
        return self.inner.need

    @property
    def moves_base(self) -> bool:
        return self.inner.moves_base

    def portioned(self, evidence: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Method | None]:
        parts = self.inner.portioned(evidence)
        return {name: None if inner is None else DoRA(inner) for name, inner in parts.items()}

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[Method, Mapping[str, Tensor]]:
        inner, parts = self.inner.plain(_inner(tensors))
        return DoRA(inner), {"magnitude": tensors["magnitude"], **_outer(parts)}

    def regained(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        parts = self.inner.regained(_inner(tensors), _inner(own))
        return None if parts is None else {"magnitude": tensors["magnitude"], **_outer(parts)}

    def unmoved(self) -> Method:
        return DoRA(self.inner.unmoved())

    def refusal(self, shape: Shape) -> str | None:
        return self.inner.refusal(shape)


def _inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wrapped adapter's own tensors, by its names."""
    return {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if name != "magnitude"}


def _outer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": tensor for name, tensor in tensors.items()}


class DoRAAdapter(Adapter):
    """inner: the wrapped adapter; magnitude, fp32 or wider since a gain lies close to 1: (*batch, out), or (in,)
    for an embedding."""

    needs_weight = True
    reads_weight = True

    def __init__(self, inner: Adapter, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, inner.dropout)
        self.dropout_on = inner.dropout_on
        self.inner = inner
        wide = torch.promote_types(dtype, torch.float32)
        outputs = shape.in_ if shape.lookup else shape.out
        self.magnitude = nn.Parameter(torch.empty(*shape.batch, outputs, dtype=wide))

    def reset_parameters(self) -> None:
        self.inner.seed_key = self.seed_key
        self.inner.reset_parameters()
        self.magnitude.fill_(1.0)

    def _apply(self, fn: Callable, recurse: bool = True) -> DoRAAdapter:
        wide = self.magnitude.detach()
        super()._apply(fn, recurse)
        if not self.magnitude.is_meta and self.magnitude.dtype.itemsize < 4:  # a cast of the model to 16 bit
            self.magnitude.data = wide.to(self.magnitude.device)
        return self

    def start(self, weight: Tensor) -> NewBase | None:
        self.inner.evidence = self.evidence
        moved = self.inner.start(weight) if self.inner.needs_weight else None
        self.inner.evidence = None
        self.magnitude.copy_(self._row_norm(weight if moved is None else moved.matrix.to(weight.dtype)))
        return moved

    def new_weight(self, weight: Tensor) -> Tensor:
        return self._over_outputs(self.gain(weight)) * self.inner.new_weight(weight)

    def delta(self) -> Tensor:
        raise VeneerError("DoRA is not additive: its change of W depends on W; use new_weight(W) - W")

    def form(self, dtype: torch.dtype | None = None) -> Form | None:
        return self.inner.form(dtype)

    def keep(self) -> Tensor | None:
        return self.inner.keep()

    def dropped_weight(self, weight: Tensor, keep: Tensor) -> Tensor:
        return self._over_outputs(self.gain(weight)) * self.inner.dropped_weight(weight, keep)

    def own_shared(self) -> None:
        self.inner.own_shared()

    def shared_state(self) -> Shared | None:
        return self.inner.shared_state()

    def packed(self) -> dict[str, Tensor]:
        return {"magnitude": self.magnitude.detach(), **_outer(self.inner.packed())}

    def packed_shared(self) -> dict[str, Tensor]:
        return _outer(self.inner.packed_shared())

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.magnitude.copy_(tensors["magnitude"])
        self.inner.unpack(_inner(tensors))

    def progress(self) -> dict[str, Tensor]:
        return self.inner.progress()

    def resume(self, progress: Mapping[str, Tensor]) -> None:
        self.inner.resume(progress)

    def bias_delta(self) -> Tensor | None:
        return self.inner.bias_delta()

    def fast_parameters(self) -> list[str]:
        inner = [f"inner.{name}" for name in self.inner.fast_parameters()]
        return ["magnitude", *inner] if inner else []

    def gain(self, weight: Tensor, form: Form | None = None) -> Tensor:
        norm = self.row_norm(weight, form)
        # A row of zeros stays a row of zeros whatever its gain; dividing by its norm would give NaN gradients.
        some, one = norm > 0, torch.ones_like(norm)
        return torch.where(some, self.magnitude / torch.where(some, norm, one), one)

    def row_norm(self, weight: Tensor, form: Form | None = None) -> Tensor:
        """‖W + ΔW‖ of every output, shaped as the magnitude, without gradient. form: ΔW's, if it is known already.

        On a CPU it is kept between calls where gradients are off, with copies of the trained numbers to tell whether
        it still holds: what writes through `.data` or raw pointers leaves no other trace. Elsewhere that comparison
        would make the device wait.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.device.type != "cpu":
            self._cache.pop("norm", None)
            with torch.no_grad(), without_autocast(weight):
                return self._row_norm(weight, form)
        state = self.shared_state()
        parts = [self.inner] if state is None else [self.inner, state]
        trained = [p for part in parts for p in part.parameters()]
        form = form or self.inner.form()
        scale = None if form is None else form.scale  # which may have been changed for a while
        frozen = [scale, Stamp(weight), *(Stamp(b) for part in parts for b in part.buffers())]
        held = self._cache.get("norm")
        if held is None or held[0] != frozen or not all(map(torch.equal, held[1], trained)):
            with without_autocast(weight):
                held = (frozen, [p.clone() for p in trained], self._row_norm(weight, form))
            self._cache["norm"] = held
        return held[2]

    def _row_norm(self, weight: Tensor, form: Form | None = None) -> Tensor:
        form = form or self.inner.form()
        wide = torch.promote_types(self.magnitude.dtype, torch.float32)
        if form is None:
            new = self.inner.new_weight(weight.to(wide))
            return torch.linalg.vector_norm(new, dim=-2 if self.shape.lookup else -1, dtype=wide)
        if self.shape.lookup:
            weight, form = weight.mT, form.turned()
        square = form.added_square(weight, wide).add_(kept_squares(self._cache, weight, wide))
        return square.clamp_min_(0).sqrt_()

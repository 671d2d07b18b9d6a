"""Linear layers whose weight is held in fewer bits: read as dense numbers for one product at a time.

In training the fused op runs on a weight that was just read, and reads it again in the backward: between them nothing
of its size is there. Where no gradients are wanted the layer's own forward runs, which may have a kernel for packed
weights, and the adapters are added to what it gives. So it is, too, where that forward is more than x Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer import ops
from veneer.hosts.base import Layout
from veneer.hosts.linear import LinearHost
from veneer.method import Adapter, VeneerError
from veneer.ops import Term
from veneer.storage import Storage, packed_storage
from veneer.storage.base import own_class
from veneer.storage.read_linear import read_linear
from veneer.storage.recent import RECENT
from veneer.storage.requantise import Requantised, requantise


class PackedHost(LinearHost):
    """y = x Wᵀ + bias with W (out, in) in a packed storage. While an adapter is merged, `veneer.dense` is W."""

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        storage = packed_storage(module)
        if storage is None:
            return {}
        bias = storage.bias(module)
        found = {"weight": Layout.packed(storage.size(module))}
        return {**found, "bias": Layout.of(bias)} if isinstance(bias, nn.Parameter) else found

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        storage = packed_storage(module)
        return None if storage is None else storage.refusal(module)

    @property
    def storage(self) -> Storage:
        found = packed_storage(self)
        if found is None:
            raise VeneerError(f"the weight of this {type(self).__name__.removeprefix('Adapted')} was packed when its "
                              "adapters were attached and is not any more: detach them before it is changed")
        return found

    # -- reading ----------------------------------------------------------------------------------------
    def base_weight(self, param: str) -> Tensor:
        if param != "weight":
            return super().base_weight(param)
        return self._read(None) if self.veneer.dense is None else self.veneer.dense

    def carrier(self, param: str) -> Tensor | None:
        if param == "weight":
            return self.storage.carrier(self)
        return self.storage.bias(self) if param == "bias" else super().carrier(param)

    def weight_dtype(self, param: str) -> torch.dtype:
        if param != "weight":
            return super().weight_dtype(param)
        storage, seen = self.storage, self.veneer.input_dtype
        return storage.dtype(self) if seen is None or storage.knows_dtype(self) else seen

    def _read(self, dtype: torch.dtype | None) -> Tensor:
        storage = self.storage
        return RECENT.read(self, dtype or storage.dtype(self), lambda kind: storage.read(self, kind))

    def _reads(self) -> bool:
        """Whether a forward now goes by the weight as dense numbers, and not by the layer's own forward."""
        if self.veneer.dense is not None:
            return True
        if not torch.is_grad_enabled() or self.storage.own_forward:
            return False
        return not (torch.compiler.is_compiling() and self.storage.own_gradient)

    def weight_for(self, adapters: Sequence[Adapter]) -> Tensor:
        if self.veneer.dense is not None or any(adapter.reads_weight for adapter in adapters):
            return self.base_weight("weight")
        size = self.veneer.layouts["weight"].native if adapters else self.storage.size(self)
        return torch.empty(size, dtype=self.storage.dtype(self), device="meta")

    # -- applying ---------------------------------------------------------------------------------------
    def forward(self, input: Tensor) -> Tensor:
        if self.veneer.input_dtype != input.dtype:
            self.veneer.input_dtype = input.dtype
        return super().forward(input)

    def plain(self, x: Tensor) -> Tensor:
        if self.veneer.dense is None:
            return self.storage.forward(self, super().plain, x)
        return self.with_adapted(x, self.veneer.dense, None, ())

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        if self.veneer.dense is not None:
            return self.with_adapted(x, weight, bias, terms)
        own = self.storage.bias(self)
        bias = own if bias is None else bias
        if bias is own and not self._reads():
            return ops.onto(self.plain(x), x, bias, terms)
        return self._by_reading(x, weight, bias, terms)

    def with_adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        bias = self.storage.bias(self) if bias is None else bias
        dtype = self.storage.compute_dtype(self, x.dtype)
        bias = None if bias is None else bias.to(dtype)
        return super().with_terms(x.to(dtype), weight.to(dtype), bias, terms).to(self._output_dtype(x))

    def _by_reading(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        dtype = self.storage.compute_dtype(self, x.dtype)
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        inner, weight = x.to(dtype), self._read(dtype) if weight.is_meta else weight.to(dtype)
        if terms and ops.choose(inner, weight, terms, packed=True).op != "reference":
            return ops.linear(inner, weight, bias, terms, lambda: self._read(dtype)).to(self._output_dtype(x))
        base = read_linear(inner, bias, self._read, weight)
        return ops.onto(base, inner, bias, terms).to(self._output_dtype(x))

    def _output_dtype(self, x: Tensor) -> torch.dtype:
        """What the layer's own forward gives for x."""
        device = x.device.type
        if self.storage.casts_back(self) or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return x.dtype
        return torch.get_autocast_dtype(device)

    def explain_terms(self, terms: Sequence[Term]) -> tuple[str, str]:
        storage = self.storage
        if storage.own_forward:
            return "beside", f"the layer's own forward over {storage.held_as(self)}, and two small layers beside it"
        op, why = ops.choose(None, torch.empty(0, dtype=storage.dtype(self)), terms, packed=True)
        return op, (f"{why}; the weight ({storage.held_as(self)}) is read for each product; without gradients the "
                    "layer's own forward, and two small layers beside it")

    # -- merging ----------------------------------------------------------------------------------------
    def requantised(self, param: str, adapters: Sequence[Adapter]) -> Requantised | None:
        if param != "weight":
            return None
        storage = self.storage
        # In fp32, whatever it is read as: rounding W to 16 bits first would move the scales of a weight that stays.
        base = storage.read(self, torch.promote_types(storage.dtype(self), torch.float32))
        return requantise(storage, self, base, self.adapted_weight(param, adapters, wide=True, base=base))

    def write(self, param: str, value: Tensor | Requantised, keep: bool) -> None:
        if isinstance(value, Requantised):
            return self._write_packed(param, value, keep)
        if param == "bias" and self._parameters.get("bias") is None:
            return self._write_bias(value, keep)
        if param != "weight":
            return super().write(param, value, keep)
        if keep:  # the packed weight stays where it is
            self.veneer.dense, self.veneer.kept[param] = value, self.storage.carrier(self)
            return None
        base = self.storage.unpack(self, value)
        RECENT.forget(self)
        self.become(base, LinearHost)
        return None

    def _write_packed(self, param: str, value: Requantised, keep: bool) -> None:
        before = self.storage.swap(self, value.held)
        RECENT.forget(self)
        self.veneer.requantised = (value.change, value.lost)
        if keep:
            self.veneer.kept[param] = before
            self.veneer.kept_on = self.storage.carrier(self).device

    def _write_bias(self, value: Tensor, keep: bool) -> None:
        """A bias that is no parameter: of a layer that has none, or of a library that holds it in its own way."""
        before = self.storage.bias(self)
        if keep:
            self.veneer.kept["bias"] = before
        if before is None and "bias" in self._parameters:
            self.register_parameter("bias", nn.Parameter(value, requires_grad=False))
        else:
            cast(Any, self).bias = value

    def unrestorable(self) -> str | None:
        if "weight" not in self.veneer.kept or self.veneer.dense is not None:
            return None
        # What was kept is the storage's own affair, and did not move with the model.
        then, now = self.veneer.kept_on, self.storage.carrier(self).device
        return None if then == now else f"it was merged on {then} and is on {now} now; move the model back first"

    def restore(self, param: str) -> None:
        if param == "bias" and "bias" not in self._parameters:
            before = self.veneer.kept.pop("bias")  # no parameter, so that it did not move with the model
            cast(Any, self).bias = None if before is None else before.to(self.storage.carrier(self).device)
            return None
        if param != "weight":
            return super().restore(param)
        before = self.veneer.kept.pop(param)
        if self.veneer.dense is None:
            self.storage.swap(self, before)
            RECENT.forget(self)
        self.veneer.dense = self.veneer.requantised = None
        return None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `VeneerError` while something is merged that the packed weight in it would be without."""
        if self.veneer.dense is not None:
            merged = ", ".join(map(repr, self.veneer.merged))
            raise VeneerError(
                f"state_dict: {merged} is merged into layers whose packed weight ({self.storage.held_as(self)}) was "
                "kept, and that is what would be written, without the adapter. Merge for good, veneer.merge(model, "
                "keep=False), to write the merged model; veneer.unmerge(model) first to write the base; or "
                "veneer.save, which writes the adapter alone")
        found = super().state_dict(*args, **kwargs)
        if own_class(self).state_dict is not nn.Module.state_dict:  # that of a library, which leaves its children out
            into = found if kwargs.get("destination") is None else kwargs["destination"]
            self.adapters.state_dict(destination=into, prefix=f"{kwargs.get('prefix', '')}adapters.",
                                     keep_vars=kwargs.get("keep_vars", False))
        return found

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedHost:
        super()._apply(fn, recurse)
        if self.veneer.dense is not None:  # no parameter, so that nobody else moves it
            self.veneer.dense = fn(self.veneer.dense)
        return self


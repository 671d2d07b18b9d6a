"""PEFT's LoRA layers, as faces over the engine's hosts: LoRA, DoRA, AdaLoRA's pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar, cast

from torch import nn

from veneer.hosts.linear import Conv1DHost
from veneer.method import Adapter
from veneer.methods import DoRA, LoRA
from veneer.methods.dora import DoRAAdapter
from veneer.methods.lora import LoRAAdapter
from veneer.peft.layers.base import BaseTunerLayer


class Values(MutableMapping[str, Any]):
    """A value of each LoRA on a layer, by adapter name. Reads what is in force; writes it where that can be."""

    def __init__(self, layer: LoraLayer, read: Callable[[Any, Any], Any],
                 write: Callable[[Any, Any], None] | None = None) -> None:
        self._layer, self._read, self._write = layer, read, write

    def __getitem__(self, name: str) -> Any:
        pair = self._layer._lora(name) if name in self._layer.adapters else None
        if pair is None:
            raise KeyError(name)
        return self._read(self._layer._lora_method(name), pair)

    def __setitem__(self, name: str, value: Any) -> None:
        pair = self._layer._lora(name) if name in self._layer.adapters else None
        if pair is None:
            raise KeyError(name)
        if self._write is None:
            raise TypeError("this value belongs to the adapter's config, which cannot be changed on a layer; load or "
                            "add an adapter that has it")
        self._write(pair, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("take an adapter off the model with model.delete_adapter(name)")

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._layer.adapters if self._layer._lora(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class LoraLayer(BaseTunerLayer):
    """The attributes of PEFT's `LoraLayer`. `scaling` can be written; it is not saved, as in PEFT."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def _lora(self, name: str) -> LoRAAdapter | None:
        """The LoRA of an adapter, out of what wraps it; None for one of another method."""
        adapter: Adapter = self._main(name)
        if isinstance(adapter, DoRAAdapter):
            adapter = adapter.inner
        return adapter if isinstance(adapter, LoRAAdapter) else None

    def _lora_method(self, name: str) -> LoRA:
        """The method of that LoRA."""
        method = self._main(name).method
        return cast(LoRA, method.inner if isinstance(method, DoRA) else method)

    # -- factors ----------------------------------------------------------------------------------------
    @property
    def lora_A(self) -> nn.ModuleDict:
        return self._part("lora_A", nn.ModuleDict)

    @property
    def lora_B(self) -> nn.ModuleDict:
        return self._part("lora_B", nn.ModuleDict)

    @property
    def lora_embedding_A(self) -> nn.ParameterDict:
        return self._part("lora_embedding_A", nn.ParameterDict)

    @property
    def lora_embedding_B(self) -> nn.ParameterDict:
        return self._part("lora_embedding_B", nn.ParameterDict)

    @property
    def lora_magnitude_vector(self) -> nn.ModuleDict:
        return self._part("lora_magnitude_vector", nn.ModuleDict)

    # -- values -----------------------------------------------------------------------------------------
    @property
    def r(self) -> Values:
        return Values(self, lambda method, pair: pair.rank)

    @property
    def lora_alpha(self) -> Values:
        return Values(self, lambda method, pair: method.rank if method.alpha is None else method.alpha)

    @property
    def scaling(self) -> Values:
        return Values(self, lambda method, pair: pair.scale, _set_scale)

    @property
    def use_rslora(self) -> Values:
        return Values(self, lambda method, pair: method.rank_stabilized)

    @property
    def lora_bias(self) -> Values:
        return Values(self, lambda method, pair: pair.bias is not None)

    @property
    def use_dora(self) -> dict[str, bool]:
        return {name: isinstance(self._main(name).method, DoRA) for name in self.scaling}

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        return self._part("lora_dropout", nn.ModuleDict)

    @property
    def fan_in_fan_out(self) -> bool:
        return isinstance(self, Conv1DHost)

    # -- scale ------------------------------------------------------------------------------------------
    def set_scale(self, adapter: str, scale: float) -> None:
        """The scale of the adapter's config times `scale`."""
        pair = self._lora(adapter) if adapter in self.adapters else None
        if pair is not None:
            pair.scale = scale * self._lora_method(adapter).scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scale of every active adapter."""
        for name in self.active_adapters:
            if scale != 1 and name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the present scale of every active adapter, or give them their config's back."""
        for name in self.active_adapters:
            if name in self.scaling:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.scaling and not self.use_dora[adapter_name]


def _set_scale(pair: LoRAAdapter, value: Any) -> None:
    if not math.isfinite(value):
        raise ValueError(f"a scale must be finite, got {value!r}")
    pair.scale = value


class Linear(LoraLayer):
    """Over a linear layer, transformers' `Conv1D`, or a packed one."""


class Linear4bit(Linear):
    """Over bitsandbytes' `Linear4bit`."""


class Linear8bitLt(Linear):
    """Over bitsandbytes' `Linear8bitLt`."""


class Embedding(LoraLayer):
    """Over an embedding."""

    @property
    def in_features(self) -> int:
        return cast(nn.Embedding, self).num_embeddings

    @property
    def out_features(self) -> int:
        return cast(nn.Embedding, self).embedding_dim


class _ConvNd(LoraLayer):
    @property
    def in_features(self) -> int:
        return cast(nn.Conv2d, self).in_channels

    @property
    def out_features(self) -> int:
        return cast(nn.Conv2d, self).out_channels


class Conv1d(_ConvNd):
    """Over an `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """Over an `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """Over an `nn.Conv3d`."""


class MultiheadAttention(LoraLayer):
    """Over an `nn.MultiheadAttention`."""


class ParamWrapper(LoraLayer):
    """Over a module of which single parameters are adapted (`target_parameters`)."""

"""PEFT's AdaLoRA layers, as a face over the engine's hosts."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from veneer.methods.adalora import AdaLoRAAdapter
from veneer.peft.layers.lora import LoraLayer, Values


class AdaLoraLayer(LoraLayer):
    """A, B and E are parameters by adapter name here, not modules. E is (r,) where PEFT has (r, 1)."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")

    def _lora(self, name: str) -> Any:
        adapter = self._main(name)
        return adapter if isinstance(adapter, AdaLoRAAdapter) else None

    @property
    def r(self) -> Values:
        return Values(self, lambda method, adapter: method.init_r)

    @property
    def lora_alpha(self) -> Values:
        return Values(self, lambda method, adapter: method.init_r if method.alpha is None else method.alpha)

    @property
    def use_rslora(self) -> Values:
        return Values(self, lambda method, adapter: False)

    @property
    def lora_bias(self) -> Values:
        return Values(self, lambda method, adapter: False)

    @property
    def lora_A(self) -> nn.ParameterDict:  # type: ignore[override]
        return self._part("lora_A", nn.ParameterDict)

    @property
    def lora_B(self) -> nn.ParameterDict:  # type: ignore[override]
        return self._part("lora_B", nn.ParameterDict)

    @property
    def lora_E(self) -> nn.ParameterDict:
        return self._part("lora_E", nn.ParameterDict)

    @property
    def ranknum(self) -> dict[str, Tensor]:
        """How many triplets are left, by adapter name."""
        return {name: cast(AdaLoRAAdapter, self._main(name)).rank() for name in self.adapters
                if isinstance(self._main(name), AdaLoRAAdapter)}


class SVDLinear(AdaLoraLayer):
    """Over a linear layer."""

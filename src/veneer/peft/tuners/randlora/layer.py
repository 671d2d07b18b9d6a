"""PEFT's RandLoRA layers, as a face over the engine's hosts."""

from __future__ import annotations

from torch import nn

from veneer.peft.tuner_layer import BaseTunerLayer


class RandLoraLayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")

    @property
    def randlora_lambda(self) -> nn.ParameterDict:
        return self._part("randlora_lambda", nn.ParameterDict)


    @property
    def randlora_gamma(self) -> nn.ParameterDict:
        return self._part("randlora_gamma", nn.ParameterDict)

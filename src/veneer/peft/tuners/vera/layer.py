"""PEFT's VeRA layers, as a face over the engine's hosts."""

from __future__ import annotations

from torch import nn

from veneer.peft.tuner_layer import BaseTunerLayer


class VeraLayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")

    @property
    def vera_lambda_b(self) -> nn.ParameterDict:
        return self._part("vera_lambda_b", nn.ParameterDict)


    @property
    def vera_lambda_d(self) -> nn.ParameterDict:
        return self._part("vera_lambda_d", nn.ParameterDict)

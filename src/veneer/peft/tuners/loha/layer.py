"""PEFT's LoHa layers, as a face over the engine's hosts."""

from __future__ import annotations

from torch import nn

from veneer.peft.tuners.lycoris_utils import LycorisLayer


class LoHaLayer(LycorisLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    @property
    def hada_w1_a(self) -> nn.ParameterDict:
        return self._part("hada_w1_a", nn.ParameterDict)


    @property
    def hada_w1_b(self) -> nn.ParameterDict:
        return self._part("hada_w1_b", nn.ParameterDict)


    @property
    def hada_w2_a(self) -> nn.ParameterDict:
        return self._part("hada_w2_a", nn.ParameterDict)


    @property
    def hada_w2_b(self) -> nn.ParameterDict:
        return self._part("hada_w2_b", nn.ParameterDict)


    @property
    def hada_t1(self) -> nn.ParameterDict:
        return self._part("hada_t1", nn.ParameterDict)


    @property
    def hada_t2(self) -> nn.ParameterDict:
        return self._part("hada_t2", nn.ParameterDict)

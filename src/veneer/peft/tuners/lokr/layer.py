"""PEFT's LoKr layers, as a face over the engine's hosts."""

from __future__ import annotations

from torch import nn

from veneer.peft.tuners.lycoris_utils import LycorisLayer


class LoKrLayer(LycorisLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    @property
    def lokr_w1(self) -> nn.ParameterDict:
        return self._part("lokr_w1", nn.ParameterDict)


    @property
    def lokr_w1_a(self) -> nn.ParameterDict:
        return self._part("lokr_w1_a", nn.ParameterDict)


    @property
    def lokr_w1_b(self) -> nn.ParameterDict:
        return self._part("lokr_w1_b", nn.ParameterDict)


    @property
    def lokr_w2(self) -> nn.ParameterDict:
        return self._part("lokr_w2", nn.ParameterDict)


    @property
    def lokr_w2_a(self) -> nn.ParameterDict:
        return self._part("lokr_w2_a", nn.ParameterDict)


    @property
    def lokr_w2_b(self) -> nn.ParameterDict:
        return self._part("lokr_w2_b", nn.ParameterDict)


    @property
    def lokr_t2(self) -> nn.ParameterDict:
        return self._part("lokr_t2", nn.ParameterDict)

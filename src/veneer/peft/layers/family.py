"""PEFT's layers of LoHa, LoKr, VeRA, VB-LoRA and RandLoRA, as faces over the engine's hosts.

The trained parameters are there by adapter name, under PEFT's names.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.methods import LoHa, LoKr
from veneer.peft.layers.base import BaseTunerLayer


class LycorisLayer(BaseTunerLayer):
    """r, alpha and scaling by adapter name; the factors are parameters by adapter name."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")

    def _values(self, read: Any) -> dict[str, Any]:
        methods = {name: self._main(name).method for name in self.adapters}
        return {name: read(method) for name, method in methods.items() if isinstance(method, (LoHa, LoKr))}

    @property
    def r(self) -> dict[str, int]:
        return self._values(lambda method: method.rank)

    @property
    def alpha(self) -> dict[str, float]:
        return self._values(lambda method: method.rank if method.alpha is None else method.alpha)

    @property
    def scaling(self) -> dict[str, float]:
        return self._values(lambda method: (method.rank if method.alpha is None else method.alpha) / method.rank)

    @property
    def rank_dropout(self) -> dict[str, float]:
        return self._values(lambda method: method.rank_dropout)

    @property
    def module_dropout(self) -> dict[str, float]:
        return self._values(lambda method: method.module_dropout)


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


class VeraLayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")

    @property
    def vera_lambda_b(self) -> nn.ParameterDict:
        return self._part("vera_lambda_b", nn.ParameterDict)

    @property
    def vera_lambda_d(self) -> nn.ParameterDict:
        return self._part("vera_lambda_d", nn.ParameterDict)


class VBLoRALayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B")

    @property
    def vblora_logits_A(self) -> nn.ParameterDict:
        return self._part("vblora_logits_A", nn.ParameterDict)

    @property
    def vblora_logits_B(self) -> nn.ParameterDict:
        return self._part("vblora_logits_B", nn.ParameterDict)


class RandLoraLayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")

    @property
    def randlora_lambda(self) -> nn.ParameterDict:
        return self._part("randlora_lambda", nn.ParameterDict)

    @property
    def randlora_gamma(self) -> nn.ParameterDict:
        return self._part("randlora_gamma", nn.ParameterDict)

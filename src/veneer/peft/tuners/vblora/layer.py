"""PEFT's VB-LoRA layers, as a face over the engine's hosts."""

from __future__ import annotations

from torch import nn

from veneer.peft.tuner_layer import BaseTunerLayer


class VBLoRALayer(BaseTunerLayer):
    """The trained parameters by adapter name, under PEFT's names."""

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B")

    @property
    def vblora_logits_A(self) -> nn.ParameterDict:
        return self._part("vblora_logits_A", nn.ParameterDict)


    @property
    def vblora_logits_B(self) -> nn.ParameterDict:
        return self._part("vblora_logits_B", nn.ParameterDict)

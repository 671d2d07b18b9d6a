"""`RandLoraModel`: RandLoRA adapters on a model."""

from __future__ import annotations

from veneer.peft.layers.family import RandLoraLayer
from veneer.peft.tuner import BaseTuner


class RandLoraModel(BaseTuner):
    """PEFT's `RandLoraModel`. The bases that weights share are made again from their seed and are in no state dict."""

    prefix = "randlora_"
    tuner_layer_cls = RandLoraLayer
    uses_shared_state = True

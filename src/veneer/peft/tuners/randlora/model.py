"""`RandLoraModel`: RandLoRA adapters on a model."""

from __future__ import annotations

from veneer.peft.tuner import BaseTuner
from veneer.peft.tuners.randlora.layer import RandLoraLayer


class RandLoraModel(BaseTuner):
    """PEFT's `RandLoraModel`: RandLoRA adapters; their shared bases are made again from their seed and are in no state dict."""

    prefix = "randlora_"
    tuner_layer_cls = RandLoraLayer
    uses_shared_state = True

"""`VeraModel`: VeRA adapters on a model."""

from __future__ import annotations

from veneer.peft.tuner import BaseTuner
from veneer.peft.tuners.vera.layer import VeraLayer


class VeraModel(BaseTuner):
    """PEFT's `VeraModel`: VeRA adapters; their shared bases are made again from their seed and are in no state dict."""

    prefix = "vera_lambda_"
    tuner_layer_cls = VeraLayer
    uses_shared_state = True

"""`VeraModel`: VeRA adapters on a model."""

from __future__ import annotations

from veneer.peft.layers.family import VeraLayer
from veneer.peft.tuner import BaseTuner


class VeraModel(BaseTuner):
    """PEFT's `VeraModel`. The bases that weights share are made again from their seed and are in no state dict."""

    prefix = "vera_lambda_"
    tuner_layer_cls = VeraLayer
    uses_shared_state = True

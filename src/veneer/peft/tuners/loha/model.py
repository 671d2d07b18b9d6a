"""`LoHaModel`: LoHa adapters on a model."""

from __future__ import annotations

from veneer.peft.layers.family import LoHaLayer
from veneer.peft.tuner import BaseTuner


class LoHaModel(BaseTuner):
    """PEFT's `LoHaModel`: LoHa adapters."""

    prefix = "hada_"
    tuner_layer_cls = LoHaLayer

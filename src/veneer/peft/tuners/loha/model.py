"""`LoHaModel`: LoHa adapters on a model."""

from __future__ import annotations

from veneer.peft.tuner import BaseTuner
from veneer.peft.tuners.loha.layer import LoHaLayer


class LoHaModel(BaseTuner):
    """PEFT's `LoHaModel`: LoHa adapters."""

    prefix = "hada_"
    tuner_layer_cls = LoHaLayer

"""`LoKrModel`: LoKr adapters on a model."""

from __future__ import annotations

from veneer.peft.layers.family import LoKrLayer
from veneer.peft.tuner import BaseTuner


class LoKrModel(BaseTuner):
    """PEFT's `LoKrModel`: LoKr adapters."""

    prefix = "lokr_"
    tuner_layer_cls = LoKrLayer

"""LoHa: config, tuner and layers. One class of layers serves all kinds, where PEFT has one for each."""

from veneer.peft.family_configs import LoHaConfig
from veneer.peft.layers.family import LoHaLayer
from veneer.peft.submodules import lazily
from veneer.peft.tuners.loha.model import LoHaModel

__all__ = ["LoHaConfig", "LoHaLayer", "LoHaModel"]

__getattr__ = lazily(__name__, "config", "layer")

"""LoKr: config, tuner and layers. One class of layers serves all kinds, where PEFT has one for each."""

from veneer.peft.family_configs import LoKrConfig
from veneer.peft.layers.family import LoKrLayer
from veneer.peft.submodules import lazily
from veneer.peft.tuners.lokr.model import LoKrModel

__all__ = ["LoKrConfig", "LoKrLayer", "LoKrModel"]

__getattr__ = lazily(__name__, "config", "layer")

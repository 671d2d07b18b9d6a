"""VeRA: config, tuner and layers."""

from veneer.peft.family_configs import VeraConfig
from veneer.peft.layers.family import VeraLayer
from veneer.peft.submodules import lazily
from veneer.peft.tuners.vera.model import VeraModel

__all__ = ["VeraConfig", "VeraLayer", "VeraModel"]

__getattr__ = lazily(__name__, "config", "layer")

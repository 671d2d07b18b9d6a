"""VeRA: config, tuner and layers."""

from veneer.peft.family_configs import VeraConfig
from veneer.peft.layers.family import VeraLayer
from veneer.peft.tuners.vera.model import VeraModel

__all__ = ["VeraConfig", "VeraLayer", "VeraModel"]

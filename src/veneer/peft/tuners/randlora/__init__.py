"""RandLoRA: config, tuner and layers."""

from veneer.peft.family_configs import RandLoraConfig
from veneer.peft.layers.family import RandLoraLayer
from veneer.peft.tuners.randlora.model import RandLoraModel

__all__ = ["RandLoraConfig", "RandLoraLayer", "RandLoraModel"]

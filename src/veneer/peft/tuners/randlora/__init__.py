"""RandLoRA: config, tuner and layers."""

from veneer.peft.family_configs import RandLoraConfig
from veneer.peft.layers.family import RandLoraLayer
from veneer.peft.submodules import lazily
from veneer.peft.tuners.randlora.model import RandLoraModel

__all__ = ["RandLoraConfig", "RandLoraLayer", "RandLoraModel"]

__getattr__ = lazily(__name__, "config", "layer")

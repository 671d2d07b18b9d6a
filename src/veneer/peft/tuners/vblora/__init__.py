"""VB-LoRA: config, tuner and layers."""

from veneer.peft.family_configs import VBLoRAConfig
from veneer.peft.layers.family import VBLoRALayer
from veneer.peft.submodules import lazily
from veneer.peft.tuners.vblora.model import VBLoRAModel

__all__ = ["VBLoRAConfig", "VBLoRALayer", "VBLoRAModel"]

__getattr__ = lazily(__name__, "config", "layer")

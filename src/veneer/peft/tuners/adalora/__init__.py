"""AdaLoRA: config, tuner and layers."""

from veneer.peft.family_configs import AdaLoraConfig
from veneer.peft.layers.adalora import AdaLoraLayer, SVDLinear
from veneer.peft.submodules import lazily
from veneer.peft.tuners.adalora.model import AdaLoraModel

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "SVDLinear"]

__getattr__ = lazily(__name__, "config", "layer")

"""Starts of a factor pair, one family a file. Importing this package registers them."""

from veneer.inits.base import Evidence, Init, Started, init_names, make_init
from veneer.inits.corda import CorDA
from veneer.inits.eva import EVA
from veneer.inits.lora_ga import LoRAGA
from veneer.inits.quant import LoftQ, SVDQuant
from veneer.inits.random import Gaussian, Kaiming, KaimingBoth, Orthogonal, TorchInit, Xavier
from veneer.inits.svd import OLoRA, PiSSA

__all__ = [
    "EVA", "CorDA", "Evidence", "Gaussian", "Init", "Kaiming", "KaimingBoth", "LoRAGA", "LoftQ", "OLoRA", "Orthogonal",
    "PiSSA", "SVDQuant", "Started", "TorchInit", "Xavier", "init_names", "make_init",
]

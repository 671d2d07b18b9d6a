"""Veneer: thin trainable layers over a frozen PyTorch model. The native API, and nothing else."""

from veneer.allocate import update_and_allocate
from veneer.attach import activate, attach, detach, disabled, route
from veneer.calibrate import calibrate
from veneer.combine import combine
from veneer.convert import to_lora
from veneer.eva import get_eva_state_dict, initialize_lora_eva_weights
from veneer.formats import convert_file
from veneer.inits import EVA, CorDA, LoftQ, LoRAGA, OLoRA, PiSSA, SVDQuant, TorchInit
from veneer.inspect.summary import adapters, trainable
from veneer.io.info import info
from veneer.io.load import load
from veneer.io.save import save
from veneer.kbit import prepare_for_kbit_training
from veneer.merge import merge, unmerge
from veneer.merge_checkpoint import merge_checkpoint
from veneer.methods import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
from veneer.plan import plan
from veneer.quantize import dequantize, quantize
from veneer.refit import replace_lora_weights_loftq
from veneer.statistics import Statistics
from veneer.storage.recent import keep_dense

__version__ = "0.1.0"

__all__ = [
    "EVA",
    "AdaLoRA",
    "CorDA",
    "DoRA",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAGA",
    "LoftQ",
    "OLoRA",
    "PiSSA",
    "RandLoRA",
    "Rows",
    "SVDQuant",
    "Statistics",
    "TorchInit",
    "VBLoRA",
    "VeRA",
    "activate",
    "adapters",
    "attach",
    "calibrate",
    "combine",
    "convert_file",
    "dequantize",
    "detach",
    "disabled",
    "get_eva_state_dict",
    "info",
    "initialize_lora_eva_weights",
    "keep_dense",
    "load",
    "merge",
    "merge_checkpoint",
    "plan",
    "prepare_for_kbit_training",
    "quantize",
    "replace_lora_weights_loftq",
    "route",
    "save",
    "to_lora",
    "trainable",
    "unmerge",
    "update_and_allocate",
]

"""Veneer: thin trainable layers over a frozen PyTorch model. The native API, and nothing else."""

from veneer.allocate import update_and_allocate
from veneer.attach import activate, attach, detach, disabled, route
from veneer.combine import combine
from veneer.convert import to_lora
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

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA", "DoRA", "Full", "LoHa", "LoKr", "LoRA", "RandLoRA", "Rows", "VBLoRA", "VeRA", "activate", "adapters",
    "attach", "combine", "dequantize", "detach", "disabled", "info", "load", "merge", "merge_checkpoint", "plan",
    "prepare_for_kbit_training", "quantize", "replace_lora_weights_loftq", "route", "save", "to_lora",
    "trainable", "unmerge", "update_and_allocate",
]

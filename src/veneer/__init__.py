"""Veneer: thin trainable layers over a frozen PyTorch model. The native API, and nothing else."""

from veneer.attach import activate, attach, detach, disabled, merge, route, unmerge
from veneer.inspect.summary import adapters, trainable
from veneer.io.info import info
from veneer.io.load import load
from veneer.io.save import save
from veneer.methods import DoRA, Full, LoRA, Rows
from veneer.plan import plan

__version__ = "0.1.0"

__all__ = [
    "DoRA", "Full", "LoRA", "Rows", "activate", "adapters", "attach", "detach", "disabled", "info", "load",
    "merge", "plan", "route", "save", "trainable", "unmerge",
]

"""The methods, one file each. Importing this package registers them."""

from veneer.methods.adalora import AdaLoRA
from veneer.methods.dora import DoRA
from veneer.methods.full import Full
from veneer.methods.loha import LoHa
from veneer.methods.lokr import LoKr
from veneer.methods.lora import LoRA
from veneer.methods.randlora import RandLoRA
from veneer.methods.rows import Rows
from veneer.methods.vblora import VBLoRA
from veneer.methods.vera import VeRA

__all__ = ["AdaLoRA", "DoRA", "Full", "LoHa", "LoKr", "LoRA", "RandLoRA", "Rows", "VBLoRA", "VeRA"]

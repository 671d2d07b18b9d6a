"""The methods, one file each. Importing this package registers them."""

from veneer.methods.dora import DoRA
from veneer.methods.full import Full
from veneer.methods.lora import LoRA
from veneer.methods.rows import Rows

__all__ = ["DoRA", "Full", "LoRA", "Rows"]

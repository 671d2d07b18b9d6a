"""FastChat's `train_lora`, by its flags, over Veneer's engine. See docs/coming-from-fastchat.md."""

from veneer.fastchat.arguments import (
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    VeneerArguments,
    parse_arguments,
)
from veneer.fastchat.run import train

__all__ = [
    "Arguments", "DataArguments", "LoraArguments", "ModelArguments", "TrainingArguments", "VeneerArguments",
    "parse_arguments", "train",
]

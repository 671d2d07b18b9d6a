"""What transformers notes on a model that it has loaded quantised, taken away once no weight of it is."""

from __future__ import annotations

from typing import Any

from torch import nn

#: of the model; `hf_quantizer` is what says that it was loaded so
_ON_MODEL = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def forget_quantizer(model: nn.Module) -> None:
    """Make the model an ordinary one to transformers: what it saves can be loaded, and it can be cast again."""
    for part in model.modules():
        if part.__dict__.get("hf_quantizer") is None and not any(part.__dict__.get(name) for name in _ON_MODEL):
            continue
        held: Any = part
        held.hf_quantizer = None
        held.__dict__.pop("quantization_method", None)
        for name in _ON_MODEL:
            if name in held.__dict__:
                setattr(held, name, False)
        config = held.__dict__.get("config")
        if config is not None and "quantization_config" in vars(config):
            del config.quantization_config

"""autocast_adapter_dtype: of new adapters, and of those that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from veneer.peft import LoraConfig, PeftMixedModel, PeftModel, functional, get_peft_model

from . import nets


def config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def base() -> nn.Module:
    return nets.decoder().to(torch.bfloat16)


def dtypes(model: nn.Module, name: str = "default") -> set[torch.dtype]:
    return {param.dtype for key, param in model.named_parameters() if "lora_" in key and f".{name}." in key}


@pytest.mark.parametrize("kind", [PeftModel, PeftMixedModel])
@pytest.mark.parametrize("autocast", [False, True])
def test_new_adapters(autocast: bool, kind: Any, tmp_path: Path) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = kind(base(), config(), autocast_adapter_dtype=autocast)
    model.add_adapter("b", config(), autocast_adapter_dtype=autocast)
    assert dtypes(model) == dtypes(model, "b") == {dtype}
    get_peft_model(base(), config()).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "c", autocast_adapter_dtype=autocast)
    read = kind.from_pretrained(base(), tmp_path, autocast_adapter_dtype=autocast)
    assert dtypes(model, "c") == dtypes(read) == {dtype}


def test_adapters_that_are_there() -> None:
    """Without autocast both ways to cast do nothing, as in PEFT: fp32 over 16 bit stays what it is."""
    model = get_peft_model(base(), config())
    ways = (functional.cast_adapter_dtype, lambda model, *rest: model.base_model._cast_adapter_dtype(*rest))
    for cast in ways:
        cast(model, "default", False)
        assert dtypes(model) == {torch.float32}
    for cast in ways:
        model.to(torch.bfloat16)
        before = [id(param) for param in model.parameters()]
        cast(model, "default", False)
        assert dtypes(model) == {torch.bfloat16}
        cast(model, "default")
        assert dtypes(model) == {torch.float32}
        assert [id(param) for param in model.parameters()] == before

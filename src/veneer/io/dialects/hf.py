"""Hugging Face PEFT's files: `adapter_config.json` and the tensors beside it, both ways.

Written and read as PEFT 0.21 does; `hf_write` and `hf_read` hold the two directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.io.dialects.hf_read import decode
from veneer.io.dialects.hf_write import Inexpressible, encode


def describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """What the files hold, without a model: (method → number of weights, weights in all)."""
    found: Counter[str] = Counter()
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight") or key.endswith(".lora_embedding_A"):
            found[f"{kind} with {tensor.shape[0]} rows in A"] += 1
        elif key.endswith(".trainable_tokens_delta"):
            found[f"Rows of {tensor.shape[0]} tokens"] += 1
        elif ".lora_" not in key:
            found["Full"] += 1
    return dict(found), sum(found.values())


__all__ = ["Inexpressible", "decode", "describe", "encode"]

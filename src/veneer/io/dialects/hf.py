"""Hugging Face PEFT's files: `adapter_config.json` and the tensors beside it, both ways.

Written and read as PEFT 0.21 does. `hf_write` and `hf_read` hold what all files have in common, one `FileType` for
each `peft_type` what its own have (`hf_types` lists them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.io.dialects.hf_base import Inexpressible
from veneer.io.dialects.hf_read import TOKENS, decode
from veneer.io.dialects.hf_types import file_type
from veneer.io.dialects.hf_write import encode


def describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """What the files hold, without a model: (method → number of weights, weights in all).

    Raises `VeneerError` for a `peft_type` that Veneer does not read.
    """
    found: Counter[str]
    found, known = file_type(config).describe(config, tensors)
    for key, tensor in tensors.items():
        if key.endswith(TOKENS):
            found[f"Rows of {tensor.shape[0]} tokens"] += 1
        elif key not in known:
            found["Full"] += 1
    return dict(found), sum(found.values())


__all__ = ["Inexpressible", "decode", "describe", "encode"]

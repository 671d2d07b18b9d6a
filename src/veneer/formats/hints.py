"""What the tensors in PEFT's files show of the weights they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.formats.base import GIVE, GIVE_WHOLE, Hint
from veneer.io.dialects.hf_base import PREFIX
from veneer.io.dialects.hf_family import Family
from veneer.io.dialects.hf_read import TOKENS
from veneer.io.dialects.hf_types import file_type
from veneer.method import VeneerError

_LORA = re.compile(r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
                   r"(\.weight|\.bias|)")
#: whose tensors do not show the sizes of their weights
_SILENT = ("VERA", "VBLORA", "RANDLORA")

Parts = dict[str, dict[str, Tensor]]


def peft_hints(config: Mapping[str, Any], tensors: Mapping[str, Tensor], sized: bool) -> dict[str, Hint]:
    """Full name of a parameter → what the file shows of it. sized: the sizes come from elsewhere.

    Raises `VeneerError` where the file does not show enough.
    """
    kind = file_type(config)
    if config.get("target_parameters"):
        raise VeneerError(f"convert: what a file with target_parameters is on is not to be seen in it. {GIVE_WHOLE}")
    if kind.peft_type in _SILENT and not sized:
        raise VeneerError(f"convert: the tensors of {kind.peft_type} do not show the sizes of their weights. {GIVE}")
    parts: Parts = {}
    found: dict[str, Hint] = {}
    for key, tensor in tensors.items():
        name = re.sub(r"\.base_layer(?=\.(weight|bias)$)", "", key.removeprefix(PREFIX))  # beside an adapter
        if ".base_layer." in name:
            raise VeneerError(f"convert: {key!r} may be of attention or of a single parameter, which cannot be seen in "
                              f"the file. {GIVE_WHOLE}")
        module, part = _split(kind, name)
        if key in kind.shared:
            continue
        if part:
            parts.setdefault(module, {})[part] = tensor
        elif name.endswith(TOKENS):
            found[name.removesuffix(TOKENS) + ".weight"] = _rows(config, tensor)
        else:
            found[re.sub(r"\.(original_module|modules_to_save)(?=\.)", "", name)] = _plain(config, key, tensor, sized)
    return found | {f"{module}.weight": _size(kind.peft_type, module, each, sized) for module, each in parts.items()}


def _split(kind: Any, name: str) -> tuple[str, str]:
    """A key's module and part; no part where it is none of an adapter's."""
    if isinstance(kind, Family):
        module, _, piece = name.rpartition(".")
        known = {mine: part for part, mine in kind.parts.items()} | dict(kind.copies)
        return module, known.get(piece, "")
    match = _LORA.fullmatch(name)
    return (match["module"], match["part"]) if match else ("", "")


def _size(peft_type: str, module: str, parts: dict[str, Tensor], sized: bool) -> Hint:
    try:
        if peft_type in _SILENT:
            return Hint("linear", (0, 0))
        if peft_type in ("LOHA", "LOKR"):
            return _product(peft_type, module, parts, sized)
        return _low_rank(parts)
    except KeyError as error:
        raise VeneerError(f"convert: the file is not whole: {module!r} has {', '.join(sorted(parts))} and no "
                          f"{error.args[0]}") from None


def _low_rank(parts: dict[str, Tensor]) -> Hint:
    """LoRA and AdaLoRA."""
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        return Hint("embedding", (parts["lora_embedding_A"].shape[-1], parts["lora_embedding_B"].shape[0]))
    A, B = (parts["A"], parts["B"]) if "E" in parts else (parts["lora_A"], parts["lora_B"])
    return Hint("conv" if A.dim() > 2 else "linear", (B.shape[0], *A.shape[1:]))


def _product(peft_type: str, module: str, parts: dict[str, Tensor], sized: bool) -> Hint:
    """LoHa and LoKr. Without a core, a convolution looks as the linear layer that it is flattened to."""
    core = parts.get("t2")
    if core is not None and core.shape[-1] == 1 and not sized:
        raise VeneerError(f"convert: the kernel of {module!r} may be that of a Conv1d or of a Conv2d. {GIVE}")
    side = 1 if core is not None else 0  # a decomposed kernel has its factors turned
    kernel = tuple(core.shape[2:]) if core is not None else ()
    if peft_type == "LOHA":
        out, in_ = parts["w1_a"].shape[side], parts["w1_b"].shape[1]
    else:
        o1, i1 = (parts["w1"] if "w1" in parts else parts["w1_a"]).shape[0], _columns(parts, "w1")
        o2 = parts["w2"].shape[0] if "w2" in parts else parts["w2_a"].shape[side]
        kernel = tuple(parts["w2"].shape[2:]) if "w2" in parts else kernel
        out, in_ = o1 * o2, i1 * _columns(parts, "w2")
    return Hint("conv" if kernel else "linear", (out, in_, *kernel))


def _columns(parts: dict[str, Tensor], name: str) -> int:
    return (parts[name] if name in parts else parts[f"{name}_b"]).shape[1]


def _rows(config: Mapping[str, Any], tensor: Tensor) -> Hint:
    """An embedding of at least as many rows as the largest trained one asks for."""
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, Mapping) else [indices]
    most = max((max(ids) for ids in lists if ids), default=0)
    return Hint("embedding", (most + 1, tensor.shape[-1]))


def _plain(config: Mapping[str, Any], key: str, tensor: Tensor, sized: bool) -> Hint:
    """A parameter that is trained whole. Of two dimensions it is taken as PyTorch's layers store it, (out, in)."""
    if tensor.dim() == 3 and not sized:
        raise VeneerError(f"convert: {key!r} may be of a Conv1d or of stacked experts. {GIVE}")
    if tensor.dim() == 2 and config.get("fan_in_fan_out"):
        raise VeneerError(f"convert: {key!r} may be stored as (in, out), as some weights of this file are "
                          f"(fan_in_fan_out). {GIVE_WHOLE}")
    return Hint("conv" if tensor.dim() > 3 else "bias" if key.endswith(".bias") else "parameter", tuple(tensor.shape))

"""LoRA and DoRA into PEFT's config and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.io.dialects.hf_base import Draft, Inexpressible, whole_number
from veneer.io.dialects.hf_names import hits_target, patterns_for, shorten
from veneer.io.records import Record, Site, Spot
from veneer.methods import DoRA, LoRA


def place(draft: Draft, records: Sequence[Record]) -> None:
    """Which modules and parameters PEFT is to target, and thereby how it will wrap them; then their tensors."""
    for record in records:
        if record.method.moves_base:
            raise Inexpressible(f"the start of {record.method} rewrote the base weight {record.name!r}, and PEFT would "
                                "lay the adapter over the base as it was")
        site = draft.base.sites[record.name]
        for spot in _spots(draft, site, record):
            if spot.kind in ("linear", "conv1d", "conv", "embedding"):
                draft.modules.append(spot.module)
                draft.methods[spot.module] = _lora(record)
            else:
                draft.parameters.append(spot.path)
                draft.methods[spot.path] = _lora(record)
            draft.wrapped[spot.module] += 1
    if len({isinstance(record.method, DoRA) for record in records}) > 1:
        raise Inexpressible("some weights have DoRA and some LoRA; use_dora holds for all of a PEFT file")
    if len({m.bias for m in draft.methods.values()}) > 1:
        raise Inexpressible("some weights have LoRA(bias=True) and some not; lora_bias holds for all of a PEFT file")
    for record in records:
        _low_rank(draft, record)


def _lora(record: Record) -> LoRA:
    method = record.method.inner if isinstance(record.method, DoRA) else record.method
    assert isinstance(method, LoRA)
    return method


def _dora(draft: Draft) -> bool:
    return any(isinstance(record.method, DoRA) for record in draft.records.values())


def _spots(draft: Draft, site: Site, record: Record) -> tuple[Spot, ...]:
    """The places that PEFT adapts; refuses what it would adapt otherwise."""
    method, kinds = _lora(record), [spot.kind for spot in site.spots]
    dora = isinstance(record.method, DoRA)
    if not site.spots[0].module:
        raise Inexpressible(f"{site.name!r} belongs to the model itself, not to a module in it")
    if kinds[0] in ("attention", "out_proj"):
        raise Inexpressible("PEFT up to 0.21 applies LoRA on the out_proj of nn.MultiheadAttention twice, so what it "
                            f"computes depends on its version ({site.name!r})")
    if len(site.spots) > 1:
        draft.tie(site)
    if site.unusual:
        raise Inexpressible(f"{site.name!r} is a convolution with {', '.join(site.unusual)}, on which PEFT's LoRA "
                            "is another function")
    if dora and len(kinds) > 1:
        raise Inexpressible(f"{site.name!r} is tied, and PEFT's DoRA gives each of its places lengths of their own")
    if dora and kinds[0] not in ("linear", "conv1d", "conv", "embedding"):
        raise Inexpressible(f"PEFT has no DoRA on {kinds[0]} weights ({site.name!r})")
    if method.bias and (dora or not set(kinds) <= {"linear", "conv1d", "conv"}):
        raise Inexpressible(f"PEFT has no lora_bias for {kinds[0]} weights or DoRA ({site.name!r})")
    return site.spots


# -- tensors ------------------------------------------------------------------------------------------------
def _low_rank(draft: Draft, record: Record) -> None:
    site = draft.base.sites[record.name]
    part = {key.removeprefix("inner."): tensor for key, tensor in record.tensors.items()}
    for spot in site.spots:
        if spot.path in draft.parameters:
            _put_parameter(draft, spot, site, part)
        elif spot.kind == "embedding":
            at = draft.path(spot.module)
            draft.tensors |= {f"{at}.lora_embedding_A": part["B"].mT, f"{at}.lora_embedding_B": part["A"].mT}
            if "magnitude" in part:
                draft.tensors[f"{at}.lora_magnitude_vector"] = part["magnitude"]
        else:
            _put_matrix(draft, spot, site, part, _lora(record))


def _put_matrix(draft: Draft, spot: Spot, site: Site, part: dict[str, Tensor], method: LoRA) -> None:
    at, A, B = draft.path(spot.module), part["A"], part["B"]
    magnitude = part.get("magnitude")
    if spot.kind == "conv":  # PEFT keeps a convolution by A's kernels and one of size 1
        ones = [1] * (len(site.layout.native) - 2)
        A, B = A.reshape(-1, *site.layout.native[1:]), B.reshape(*B.shape, *ones)
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    draft.tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
    if magnitude is not None:
        draft.tensors[f"{at}.lora_magnitude_vector"] = magnitude
    if "bias" in part:
        draft.tensors[f"{at}.lora_B.bias"] = _unscaled(part["bias"], method.scale, site.name)


def _unscaled(bias: Tensor, scale: float, name: str) -> Tensor:
    """PEFT multiplies this bias by the scale: divided by it here, in the dtype that brings the same bits back."""
    for dtype in (bias.dtype, torch.float64):
        divided = bias.to(dtype) / scale
        if torch.equal(rescaled(divided, scale, bias.dtype), bias):
            return divided
    raise Inexpressible(f"PEFT multiplies lora_bias by the scale {scale:g}, and dividing {name!r}'s by it would round")


def rescaled(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The inverse: in fp64, rounded once."""
    return (bias.double() * scale).to(dtype)


def _put_parameter(draft: Draft, spot: Spot, site: Site, part: dict[str, Tensor]) -> None:
    """PEFT stacks the experts' A by rows, (E·r, in), and interleaves their B by columns, (out, r·E)."""
    mine = [path for path in _in_order(draft, spot.module) if path in draft.parameters]
    depth = len(mine) - 1 - mine.index(spot.path)  # the module's last parameter is wrapped outermost
    at = draft.path(spot.module) + ".base_layer" * depth
    A, B = part["A"], part["B"]
    if site.layout.shape.batch:
        A = A.reshape(-1, A.shape[-1])
        B = B.permute(1, 2, 0).reshape(B.shape[1], -1)
    draft.tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}


def _in_order(draft: Draft, module: str) -> list[str]:
    return [path for path, site in draft.base.by_path.items()
            if any(spot.module == module and spot.path == path for spot in site.spots)]


# -- the config ---------------------------------------------------------------------------------------------
def config(draft: Draft) -> dict[str, Any]:
    """LoraConfig's own keys."""
    methods: list[LoRA] = list(draft.methods.values())
    stabilized = bool(methods) and all(m.rank_stabilized for m in methods)
    ranks = {name: m.rank for name, m in draft.methods.items()}
    alphas = {name: _alpha(m, stabilized) for name, m in draft.methods.items()}
    rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0] if methods else (8, 8)
    found: dict[str, Any] = {
        "alpha_pattern": patterns_for(alphas, alpha), "lora_alpha": alpha, "lora_dropout": _dropout(draft),
        "init_lora_weights": "gaussian" if methods and all(m.init == "gaussian" for m in methods) else True,
        "r": rank, "rank_pattern": patterns_for(ranks, rank), "use_dora": _dora(draft), "use_rslora": stabilized,
    }
    if any(m.bias for m in methods):
        found["lora_bias"] = True
    if draft.parameters:
        found["target_parameters"] = _parameter_entries(draft)
    return found


def _alpha(method: LoRA, stabilized: bool) -> float:
    alpha = method.rank if method.alpha is None else method.alpha
    if method.rank_stabilized and not stabilized:
        alpha = method.scale * method.rank
    return whole_number(alpha)


def _dropout(draft: Draft) -> float:
    rates = Counter(method.dropout for method in draft.methods.values())
    outputs = {method.dropout for method in draft.methods.values() if method.dropout_on == "output"} - {0.0}
    if outputs:
        draft.notes.append(f"PEFT's lora_dropout is of inputs; that of outputs here ({min(outputs)}) is in veneer.json")
    if draft.parameters and set(rates) != {0.0}:
        draft.notes.append("lora_dropout is 0 in adapter_config.json, since PEFT has none for target_parameters; "
                           "veneer.json keeps the real ones")
        return 0.0
    common = rates.most_common(1)[0][0] if rates else 0.0
    if len(rates) > 1:
        draft.notes.append(f"lora_dropout is {common} in adapter_config.json, which has one value for all weights; "
                           "veneer.json keeps the real ones")
    return common


def _parameter_entries(draft: Draft) -> list[str]:
    biased = any(m.bias for m in draft.methods.values())
    if _dora(draft) or biased or any(draft.kind(m) == "conv1d" for m in draft.modules):
        raise Inexpressible("target_parameters goes with neither DoRA, lora_bias nor Conv1D layers in a PEFT file")
    entries = shorten(draft.parameters, draft.known(draft.base.by_path), hits_target)
    if entries is None:
        raise Inexpressible("target_parameters matches by the end of a name, and another parameter's name ends alike")
    return entries

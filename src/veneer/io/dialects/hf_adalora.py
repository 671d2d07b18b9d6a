"""AdaLoRA in PEFT's files: triplets that were pruned are left out there, and kept as zeros here.

`rank_pattern` says for every module which of its `init_r` triplets are left; the file holds only those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.hosts import Layout
from veneer.io.dialects.hf_base import Draft, Inexpressible, Reading, whole_number
from veneer.io.dialects.hf_family import Family, Option
from veneer.io.dialects.hf_lora import PASSED_OVER, REFUSED
from veneer.io.records import Record, Site
from veneer.method import Method
from veneer.methods import AdaLoRA

_END = ".lora_E"


class AdaLoraFiles(Family):
    """`peft.AdaLoraConfig`."""

    # -- writing ----------------------------------------------------------------------------------------
    def put(self, draft: Draft, record: Record, stem: str, layout: Layout) -> None:
        A, E, B, kept = (*(record.tensors[part] for part in ("A", "E", "B")), _kept(record))
        draft.tensors |= {f"{stem}lora_A": A[kept], f"{stem}lora_E": E[kept].unsqueeze(-1), f"{stem}lora_B": B[:, kept]}

    def config(self, draft: Draft) -> dict[str, Any]:
        found = {**super().config(draft), "rank_pattern": None}
        if any(method.total_step is None for method in draft.methods.values()):
            draft.notes.append(f"total_step is {found['total_step']} in adapter_config.json, since PEFT must have one, "
                               "and none was set")
        kept = {draft.base.sites[record.name].spots[0].module: _kept(record)
                for record in draft.records.values() if isinstance(record.method, AdaLoRA)}
        if all(each.all() for each in kept.values()):
            return found
        for module in kept:
            # PEFT's loader tells names in its own files from a trainer's by whether the adapter's name is in them.
            if "default" in module:
                raise Inexpressible(f"PEFT's AdaLoRA mistakes 'default' in the module's name {module!r} for the name "
                                    "of the adapter")
        return {**found, "rank_pattern": {module + _END: each.tolist() for module, each in kept.items()}}

    # -- reading ----------------------------------------------------------------------------------------
    def method_for(self, config: Mapping[str, Any], module: str) -> Method:
        alpha = config["lora_alpha"]
        if alpha <= 0:  # PEFT then takes the rank that is left
            alpha = sum(_pattern(config).get(module, ())) or config["init_r"]
        target = min(config["target_r"], config["init_r"])  # PEFT's default may be more, if nothing was ever cut
        return super().method_for({**config, "lora_alpha": alpha, "target_r": target}, module)

    def finish(self, reading: Reading) -> None:
        super().finish(reading)
        adapted = {reading.map.sites[name].spots[0].module for name, record in reading.records.items()
                   if isinstance(record.method, AdaLoRA)}
        for module, kept in _pattern(reading.config).items():
            if module not in adapted:
                reading.problems.append(f"unexpected: rank_pattern has {module + _END!r}, and the file has no tensors "
                                        "of it")
            elif len(kept) != reading.config["init_r"]:
                reading.problems.append(f"rank_pattern has {len(kept)} entries for {module + _END!r}, and init_r is "
                                        f"{reading.config['init_r']}")

    def adopt(self, reading: Reading, record: Record, site: Site) -> dict[str, Tensor]:
        kept = _pattern(reading.config).get(site.spots[0].module)
        size = reading.config["init_r"]
        mask = torch.ones(size, dtype=torch.bool) if kept is None else torch.tensor(kept, dtype=torch.bool)
        parts = dict(record.tensors)
        if "E" in parts and parts["E"].shape[1:] == (1,):
            parts["E"] = parts["E"].squeeze(-1)
        return {part: _spread(tensor, mask, 1 if part == "B" else 0) for part, tensor in parts.items()} | {"mask": mask}

    def summary(self, config: Mapping[str, Any], module: str) -> str:
        kept = _pattern(config).get(module)
        size = config["init_r"]
        return f"AdaLoRA with {size if kept is None else sum(kept)} of {size} ranks"


def _pattern(config: Mapping[str, Any]) -> dict[str, list[bool]]:
    """module → which triplets are left; the keys may have the adapter's name after their end."""
    return {name.partition(_END)[0]: kept for name, kept in (config["rank_pattern"] or {}).items()}


def _spread(tensor: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Zeros for the masked triplets, where the tensor has just those that are left."""
    if tensor.dim() <= dim or tensor.shape[dim] != int(mask.sum()) or mask.all():
        return tensor
    size = [*tensor.shape]
    size[dim] = len(mask)
    return tensor.new_zeros(size).index_copy_(dim, mask.nonzero().flatten(), tensor)


def _kept(record: Record) -> Tensor:
    """The triplets that are left: what was cut may have grown again since."""
    return record.tensors["mask"] | (record.tensors["E"] != 0)


def _steps(method: Any) -> tuple[int, int, int]:
    """tinit, tfinal, total_step, of which PEFT must have all: the fewest steps there can be where none are set."""
    plan = method.schedule
    if plan is None:
        first, last = method.tinit or 0, method.tfinal or 0
        return first, last, first + last + 1
    return plan.start, method.total_step - plan.end, method.total_step


def _alpha(method: Any) -> float:
    return whole_number(method.init_r if method.alpha is None else method.alpha)


def _refusal(method: Any, site: Site, parts: Collection[str]) -> str | None:
    return None if _alpha(method) > 0 else "PEFT's AdaLoRA takes a rank for an alpha of 0 or less"


ADALORA = AdaLoraFiles(
    "ADALORA", AdaLoRA, ("Linear", "Conv1D", "Conv2d"),
    {"init_r": Option("init_r", 12),
     "target_r": Option("target_r", 8),
     "tinit": Option("tinit", 0, write=lambda method: _steps(method)[0]),
     "tfinal": Option("tfinal", 0, write=lambda method: _steps(method)[1]),
     "deltaT": Option("deltaT", 1),
     "beta1": Option("beta1", 0.85),
     "beta2": Option("beta2", 0.85),
     "orth_reg_weight": Option("orth_reg_weight", 0.5),
     "total_step": Option("total_step", None, write=lambda method: _steps(method)[2]),
     "lora_alpha": Option("alpha", 8, write=_alpha),
     "lora_dropout": Option("dropout", 0.0, training=True)},
    {"A": "lora_A", "E": "lora_E", "B": "lora_B"},
    more_keys={"exclude_modules": None, "rank_pattern": None, "trainable_token_indices": None,
               "ensure_weight_tying": False},
    passed_over=PASSED_OVER | {"r", "use_rslora", "lora_bias", "alpha_pattern", "init_lora_weights"},
    refused={**REFUSED, "use_dora": "PEFT's AdaLoRA has no DoRA",
             "target_parameters": "PEFT's AdaLoRA adapts modules, not single parameters"},
    bias_only="lora_only", carried=("dilation",), refusal=_refusal)

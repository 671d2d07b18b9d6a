"""NeMo AutoModel's directories: which adapters they hold, and what their settings say of how one was trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from veneer.formats.content import META_NEMO, Content
from veneer.io.dialects.hf_base import Inexpressible, way_out
from veneer.io.records import Record
from veneer.method import Method
from veneer.methods import DoRA, LoRA
from veneer.nemo.config import POSITIONS, STARTS, PeftConfig
from veneer.nemo.files import read_config, worded


def as_trained(records: list[Record], source: Path) -> list[Record]:
    """The records with the dropout and the start that NeMo's settings have, which PEFT's config has not."""
    config = read_config(source)
    said = {"dropout": config.dropout, "dropout_on": POSITIONS[config.dropout_position],
            "init": STARTS[config.lora_A_init]}
    return [dataclasses.replace(record, method=_with(record.method, said)) for record in records]


def _with(method: Method, said: dict[str, Any]) -> Method:
    if isinstance(method, DoRA):
        return DoRA(_with(method.inner, said))
    return dataclasses.replace(method, **said) if isinstance(method, LoRA) else method


def dressed(content: Content, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """PEFT's config as NeMo words it, its further files, and notes. Raises `Inexpressible` for what NeMo lacks."""
    settings, notes = _settings(content)
    kept, extra = worded(config, content.records, content.base, settings)
    return kept, extra, notes


def _settings(content: Content) -> tuple[PeftConfig, list[str]]:
    pairs = {record.name: _pair(record, content) for record in content.records}
    linear = {name: method for name, method in pairs.items() if content.base.sites[name].is_linear} or pairs
    first = next(iter(linear.values()))
    for name, method in pairs.items():
        same_rank = method.rank == first.rank or name not in linear  # experts have a rank of their own
        if not same_rank or _alpha(method) != _alpha(first):
            raise Inexpressible(f"{name!r} has {method} and {next(iter(linear))!r} {first}; NeMo has one dim and one "
                                "alpha for all layers")
    kinds = {isinstance(record.method, DoRA) for record in content.records}
    if len(kinds) > 1:
        raise Inexpressible("some weights have DoRA and some LoRA; NeMo's use_dora holds for all")
    said = json.loads(content.header.get(META_NEMO, "{}"))
    if said:
        return PeftConfig.from_dict({**said, "dim": first.rank, "alpha": _alpha(first)}), []
    return _made(content, first, kinds.pop(), list(pairs.values()))


def _pair(record: Record, content: Content) -> LoRA:
    method = record.method.inner if isinstance(record.method, DoRA) else record.method
    site = content.base.sites[record.name]
    if not isinstance(method, LoRA):
        raise Inexpressible(f"{record.name!r} has {record.method}; NeMo has LoRA and DoRA"
                            f"{way_out(record.method, with_dora=True)}")
    if not site.is_linear and not site.layout.shape.batch:
        raise Inexpressible(f"{record.name!r} is of kind {site.spots[0].kind}; NeMo adapts linear layers and experts")
    if method.rank_stabilized or method.bias:
        what = "rank_stabilized=True (its scale is alpha/dim)" if method.rank_stabilized else "bias=True"
        raise Inexpressible(f"{record.name!r} has {method}; NeMo has no {what}")
    return method


def _alpha(method: LoRA) -> float:
    return method.rank if method.alpha is None else method.alpha


def _made(content: Content, first: LoRA, dora: bool, methods: list[LoRA]) -> tuple[PeftConfig, list[str]]:
    notes = []
    start = {mine: name for name, mine in reversed(STARTS.items())}.get(str(first.init))
    if start is None:
        notes.append(f"NeMo has no start such as {first.init!r}; its settings say xavier, and veneer.json the real one")
    if len({(m.dropout, m.dropout_on) for m in methods}) > 1:
        notes.append(f"dropout is {first.dropout} in NeMo's settings, which have one for all; veneer.json keeps the "
                     "real ones")
    dtypes = {str(t.dtype).removeprefix("torch.") for r in content.records for part, t in r.tensors.items()
              if part != "magnitude"}
    modules = [spot.module for record in content.records for spot in content.base.sites[record.name].spots]
    return PeftConfig(
        target_modules=sorted(modules), dim=first.rank, alpha=_alpha(first), dropout=first.dropout,
        dropout_position="post" if first.dropout_on == "output" else "pre", lora_A_init=start or "xavier",
        lora_dtype=dtypes.pop() if len(dtypes) == 1 else None, use_dora=dora), notes

"""The native format: one safetensors file with keys `<weight name>/<tensor>`, its plan in the manifest.

For what PEFT's config cannot say. The file has a name of its own, so that other tools find no adapter here
rather than half of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.io.records import Record
from veneer.method import Method


def encode(records: list[Record]) -> dict[str, Tensor]:
    """Records → tensors by key."""
    return {f"{r.name}/{key}": tensor for r in records for key, tensor in r.tensors.items()}


def decode(plan: Mapping[str, Method], tensors: Mapping[str, Tensor]) -> tuple[list[Record], list[str]]:
    """The plan and the tensors → records, and the keys that belong to no weight of the plan."""
    records = {name: Record(name, method, {}) for name, method in plan.items()}
    unknown = []
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if name in records:
            records[name].tensors[part] = tensor
            records[name].keys[part] = key
        else:
            unknown.append(key)
    return list(records.values()), unknown

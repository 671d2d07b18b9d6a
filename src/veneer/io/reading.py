"""What an adapter's file holds, read for one model: records that fit it whole, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.io import native, store
from veneer.io.carried import reconcile
from veneer.io.dialects import hf
from veneer.io.fingerprint import compare
from veneer.io.records import BaseMap, Record, base_map, base_weights, expected_tensors, near
from veneer.method import Method, nearest
from veneer.weights import Weight, original


class Reading(NamedTuple):
    """An adapter's file against a model: its records that fit the model whole, and what is wrong with the others."""

    stored: store.Stored
    weights: list[Weight]
    records: list[Record]
    problems: list[str]


def read_records(model: nn.Module, path: str | Path, allow_pickle: bool = False,
                 values: Callable[[Weight], Tensor | None] = original) -> Reading:
    """Read the adapter at `path` for a model, which is not touched. values: the numbers of a base weight, where the
    file carries some to compare with; None where they are gone."""
    return records_in(model, store.read(path, allow_pickle), values)


def records_in(model: nn.Module, stored: store.Stored, values: Callable[[Weight], Tensor | None] = original) -> Reading:
    """The same for what was read already, or never was in a file."""
    weights = base_weights(model)
    base = base_map(model, weights)
    records, problems = _decode(stored, base, weights, values)
    records, unfit = fitting(records, base)
    problems += unfit
    if stored.fingerprint is not None:
        problems = _other_base(compare(stored.fingerprint, weights), len(stored.fingerprint.samples)) + problems
    return Reading(stored, weights, records, problems)


def _other_base(differences: list[str], weights: int) -> list[str]:
    if not differences:
        return []
    more = " …" if len(differences) > 3 else ""
    return [f"another base model: {len(differences)} of {weights} base weights differ: "
            + "; ".join(differences[:3]) + more]


def _decode(stored: store.Stored, base: BaseMap, weights: list[Weight],
            values: Callable[[Weight], Tensor | None]) -> tuple[list[Record], list[str]]:
    plan = stored.manifest.plan if stored.manifest else {}
    if stored.layout == "native":
        records, unknown = native.decode(plan, stored.tensors)
        return records, [_unexpected(key, plan) for key in unknown]
    assert stored.config is not None
    reading = hf.decode(stored.config, stored.tensors, base)
    rows, problems, notes = reconcile(reading.base, weights, set(reading.records), values)
    records = [*reading.records.values(), *rows]
    problems = reading.problems + problems
    stored.notes += reading.notes + notes
    if plan:
        records = as_planned(records, plan)
    return records, problems


def as_planned(records: list[Record], plan: Mapping[str, Method]) -> list[Record]:
    """The methods as the manifest has them, which knows more of them than PEFT's config; and what is missing."""
    by_name = {record.name: record for record in records}
    for name, method in plan.items():
        record = by_name.setdefault(name, Record(name, method, {}))
        record.method = method
    return list(by_name.values())


def fitting(records: list[Record], base: BaseMap) -> tuple[list[Record], list[str]]:
    """The records that fit the base whole, and what is wrong with the others."""
    good: list[Record] = []
    problems: list[str] = []
    owners = _owners(records, base)
    order = {name: i for i, name in enumerate(base.sites)}
    for record in records:
        site = base.sites.get(record.name)
        if site is None:
            problems.append(f"unexpected: weight {record.name!r} is not in this model"
                            f"{near(record.name, base.sites, problems)}")
            continue
        reason = record.method.refusal(site.layout.shape)
        if reason is not None:
            problems.append(f"{type(record.method).__name__} cannot adapt {record.name!r}: {reason}")
            continue
        wrong = _wrong_tensors(record, expected_tensors(record.method, site.layout, record.name in owners))
        problems += wrong
        if not wrong:
            good.append(record)
    groups: dict[Method, list[Record]] = {}
    for record in sorted(good, key=lambda record: order[record.name]):
        groups.setdefault(record.method, []).append(record)
    return [record for group in groups.values() for record in _together(group, records, base)], problems


def _owners(records: list[Record], base: BaseMap) -> set[str]:
    """The first weight, in the model's order, of each method."""
    methods = {record.name: record.method for record in records}
    first: dict[Method, str] = {}
    for name in base.sites:
        if name in methods:
            first.setdefault(methods[name], name)
    return set(first.values())


def _together(group: list[Record], records: list[Record], base: BaseMap) -> list[Record]:
    """Whole weights with one method, in the model's order; none of them where a state they share is nowhere whole.

    The first gets that state, whichever weight of the file had it, and all get one dtype: two would be two methods.
    """
    method, sites = group[0].method, [base.sites[record.name] for record in group]
    with torch.device("meta"):
        shares = method.shared(torch.float32) is not None
    if not shares:
        return [_retyped(r, _dtype(r.tensors), site.dtype) for r, site in zip(group, sites, strict=True)]
    own, wanted = (expected_tensors(method, sites[0].layout, owner) for owner in (False, True))
    dtypes = [_dtype({part: tensor for part, tensor in record.tensors.items() if part in own}) for record in group]
    for part in wanted.keys() - own.keys():
        held = (r.tensors[part] for r in records if r.method == method and part in r.tensors)
        found = next((tensor for tensor in held if tensor.shape == wanted[part].shape), None)
        if found is None:
            return []
        group[0].tensors[part] = found
    widest = functools.reduce(torch.promote_types, dtypes)
    return [_retyped(r, widest, functools.reduce(torch.promote_types, [s.dtype for s in sites])) for r in group]


def _wrong_tensors(record: Record, expected: Mapping[str, Tensor]) -> list[str]:
    out = []
    for part, want in expected.items():
        if part in record.restarted:
            continue
        key = record.keys.get(part, f"{record.name}/{part}")
        if part not in record.tensors:
            out.append(f"missing: {part} of {record.name!r} (no {key!r} in the file)")
        elif record.tensors[part].shape != want.shape:
            out.append(f"wrong shape: {key!r} is {tuple(record.tensors[part].shape)} as {part} of {record.name!r}, "
                       f"which needs {tuple(want.shape)}")
    out += [_unexpected(record.keys.get(part, part), expected) for part in record.tensors if part not in expected]
    return out


def _unexpected(key: str, known: Any) -> str:
    return f"unexpected: {key!r}{nearest(key, known)}"


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for part, t in tensors.items() if part != "magnitude"])


def _retyped(record: Record, dtype: torch.dtype, base: torch.dtype) -> Record:
    """The record with the dtype its tensors have in the file, so that loading rounds nothing."""
    return dataclasses.replace(record, method=_replace_dtype(record.method, dtype,
                                                             torch.promote_types(base, torch.float32)))


def _replace_dtype(method: Method, dtype: torch.dtype, default: torch.dtype) -> Method:
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    if "dtype" in fields:
        return method if (fields["dtype"] or default) == dtype else dataclasses.replace(method, **{"dtype": dtype})
    inner = fields.get("inner")
    if isinstance(inner, Method):
        return type(method)(_replace_dtype(inner, dtype, default))
    return method

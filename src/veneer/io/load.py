"""load: an adapter from a path onto a model, whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import adapter_names, attach, attached, hosts
from veneer.io import native, store
from veneer.io.carried import reconcile
from veneer.io.dialects import hf
from veneer.io.fingerprint import compare
from veneer.io.records import SHOWN, BaseMap, Record, base_map, base_weights, expected_tensors, near
from veneer.method import Adapter, Method, VeneerError, method_class, method_to_dict, nearest
from veneer.plan import resolve
from veneer.sharding import spread_like
from veneer.weights import Weight
from veneer.wrappers import unwrap


@dataclass(frozen=True)
class LoadReport:
    """What `load` did. problems: what a strict load would have refused; empty after a strict one."""

    path: Path
    name: str
    format: str
    weights: int
    parameters: int
    problems: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"loaded {self.weights} weights, {self.parameters:,} parameters as {self.name!r} from {self.path} "
                 f"({self.format} format)"]
        lines += [f"problem: {text}" for text in self.problems]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])


def load(model: nn.Module, path: str | Path, name: str = "default", strict: bool = True, *,
         allow_pickle: bool = False) -> LoadReport:
    """Put the adapter at `path` onto the model as `name`.

    path: a directory that `save` or PEFT wrote, or a tensor file in it. A model without an adapter `name` gets
    one by the file's own plan, in the file's dtypes, live and trainable as after `attach`. If it has one of the
    same plan, that one's values are replaced, and it stays as live and as trainable as it was (see `activate`).
    strict: missing and unexpected tensors, wrong shapes, another base model raise one `VeneerError` that lists
    them with the nearest matches, and the model is as before. Otherwise they are listed in the report, and the
    weights that are whole are loaded. Never touches the network; pickle files only with `allow_pickle`, and
    then only tensors out of them.
    """
    model = unwrap(model)
    stored = store.read(path, allow_pickle)
    weights = base_weights(model)
    base = base_map(model, weights)
    records, problems = _decode(stored, base, weights)
    records, unfit = _check(records, base)
    problems += unfit
    if stored.fingerprint is not None:
        problems = _other_base(compare(stored.fingerprint, weights), len(stored.fingerprint.samples)) + problems
    existing = name in adapter_names(model)
    if existing:
        problems += _against_existing(model, name, records)
    if problems and strict:
        raise VeneerError(_listing(stored, problems))
    if not records:
        raise VeneerError(f"nothing in {stored.file} fits this model\n" + _listing(stored, problems))
    if not existing:
        _attach(model, weights, records, name, stored)
    filled = _fill(model, name, records)
    count = sum(t.numel() for r in records for t in r.tensors.values())
    return LoadReport(stored.file.parent, name, stored.layout, filled, count, tuple(problems), tuple(stored.notes))


def _other_base(differences: list[str], weights: int) -> list[str]:
    if not differences:
        return []
    more = " …" if len(differences) > 3 else ""
    return [f"another base model: {len(differences)} of {weights} base weights differ: "
            + "; ".join(differences[:3]) + more]


def _decode(stored: store.Stored, base: BaseMap, weights: list[Weight]) -> tuple[list[Record], list[str]]:
    plan = stored.manifest.plan if stored.manifest else {}
    if stored.layout == "native":
        records, unknown = native.decode(plan, stored.tensors)
        return records, [_unexpected(key, plan) for key in unknown]
    assert stored.config is not None
    reading = hf.decode(stored.config, stored.tensors, base)
    rows, problems, notes = reconcile(reading.base, weights, set(reading.records))
    records = [*reading.records.values(), *rows]
    problems = reading.problems + problems
    stored.notes += reading.notes + notes
    if plan:
        records = _as_planned(records, plan)
    return records, problems


def _as_planned(records: list[Record], plan: Mapping[str, Method]) -> list[Record]:
    """The methods as the manifest has them, which knows more of them than PEFT's config; and what is missing."""
    by_name = {record.name: record for record in records}
    for name, method in plan.items():
        record = by_name.setdefault(name, Record(name, method, {}))
        record.method = method
    return list(by_name.values())


def _check(records: list[Record], base: BaseMap) -> tuple[list[Record], list[str]]:
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
        return type(method)(_replace_dtype(inner, dtype, default))  # type: ignore[call-arg]
    return method


def _against_existing(model: nn.Module, name: str, records: list[Record]) -> list[str]:
    """How an adapter that is already there differs from the file's."""
    if any(name in host.veneer.merged for _, host in hosts(model)):
        raise VeneerError(f"load: adapter {name!r} is merged into the base weights; call veneer.unmerge(model) first")
    there = {weight.name: adapter for weight, adapter in attached(model, name)}
    problems = []
    for record in list(records):
        adapter = there.pop(record.name, None)
        if adapter is None:
            problems.append(f"unexpected: {record.name!r} is in the file, but adapter {name!r} on this model "
                            "is not on it")
            records.remove(record)
        else:
            own = {**adapter.packed(), **adapter.packed_shared()}
            wrong = _fitted(record, adapter, own)
            problems += wrong or _narrowed(record, own)
            if wrong:
                records.remove(record)
    return problems + [f"missing: {rest!r}, which adapter {name!r} on this model is on, is not in the file"
                       for rest in there]


def _fitted(record: Record, adapter: Adapter, own: Mapping[str, Tensor]) -> list[str]:
    """Give the record what fits an adapter that is there, also from its plain form in the file; or say why not."""
    method = adapter.method
    assert method is not None
    known = [_meaning(method), _meaning(method.unmoved().plain(own)[0])]
    if _meaning(record.method) not in known or not record.restarted <= own.keys():
        return [f"{record.name!r} is {record.method} in the file and {method} on this model"]
    tensors = method.regained({**{part: own[part] for part in record.restarted}, **record.tensors}, own)
    if tensors is None:
        return [f"{record.name!r} began from another pair of factors in the file than on this model; load it under "
                "another name"]
    record.tensors = dict(tensors)
    return []


def _narrowed(record: Record, have: Mapping[str, Tensor]) -> list[str]:
    return [f"{record.name!r}: {part} would be rounded from {tensor.dtype} to {have[part].dtype}"
            for part, tensor in record.tensors.items()
            if torch.promote_types(tensor.dtype, have[part].dtype) != have[part].dtype]


def _meaning(method: Method) -> Any:
    def strip(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        skipped = method_class(config["method"]).training_only if "method" in config else ()
        kept = {k: strip(v) for k, v in config.items() if k not in skipped}
        ranks = [kept[k] for k in ("rank", "init_r") if k in kept]
        if ranks and kept.get("alpha") is None:
            kept["alpha"] = ranks[0]  # an alpha of None is a scale of 1
        return kept

    return strip(method_to_dict(method))


def _attach(model: nn.Module, weights: list[Weight], records: list[Record], name: str, stored: store.Stored) -> None:
    chosen = {record.name: record.method for record in records}
    rules: dict[str, Method | None] = {}
    for weight in weights:
        # The parameter's full name is the one by which no other weight goes.
        full = weight.places[0].names[-1]
        method = chosen.get(weight.name)
        if method is not None:
            rules[full] = method
        elif full.endswith(".bias"):
            rules[full] = None  # a method that covers biases is to cover only what the file has
    seed = stored.manifest.seed if stored.manifest else None
    made = resolve(model, weights, rules)
    restarted = {record.name for record in records if record.restarted or record.method.moves_base}
    entries = [dataclasses.replace(entry, given=entry.name not in restarted) for entry in made.entries]
    attach(model, dataclasses.replace(made, entries=entries), name, seed=seed or 0)


@torch.no_grad()
def _fill(model: nn.Module, name: str, records: list[Record]) -> int:
    """Copy the tensors into the adapter's own parameters, which stay the objects they are."""
    by_name = {record.name: record for record in records}
    filled = 0
    for weight, adapter in attached(model, name):
        if weight.name in by_name:
            own, record = adapter.state_dict(), by_name[weight.name]
            given = {k: spread_like(t, own[k]) if k in own else t for k, t in record.tensors.items()}
            adapter.unpack({part: own[part] for part in record.restarted} | given)
            adapter.pending = False
            filled += 1
    return filled


def _listing(stored: store.Stored, problems: list[str]) -> str:
    shown = problems[:SHOWN]
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"load: {stored.file} does not fit this model ({len(problems)} problems); the model is "
                        "unchanged. strict=False loads what fits", *shown, *more])

"""load: an adapter from a path onto a model, whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import attach
from veneer.attached import adapter_names, attached, hosts
from veneer.io import store
from veneer.io.fingerprint import begun_elsewhere, held_otherwise
from veneer.io.reading import Reading, records_in
from veneer.io.records import SHOWN, Record
from veneer.method import Adapter, Method, VeneerError, method_class, method_to_dict
from veneer.plan import resolve
from veneer.sharding import spread_like
from veneer.weights import Weight, moved
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
         allow_pickle: bool = False, config: Mapping[str, Any] | None = None) -> LoadReport:
    """Put the adapter at `path` onto the model as `name`.

    path: a directory that `save` or PEFT wrote, or a tensor file in it. A model without an adapter `name` gets
    one by the file's own plan, in the file's dtypes, live and trainable as after `attach`. If it has one of the
    same plan, that one's values are replaced, and it stays as live and as trainable as it was (see `activate`).
    strict: missing and unexpected tensors, wrong shapes, another base model raise one `VeneerError` that lists
    them with the nearest matches, and the model is as before. Otherwise they are listed in the report, and the
    weights that are whole are loaded. Never touches the network; pickle files only with `allow_pickle`, and
    then only tensors out of them. config: to be used instead of the adapter_config.json of a file in PEFT's format.
    """
    model = unwrap(model)
    stored = store.read(path, allow_pickle)
    if config is not None:
        if stored.layout != "peft":
            raise VeneerError(f"load: {stored.file} is in Veneer's own format, which has no adapter_config.json to be "
                              "replaced")
        stored.config = dict(config)
        if stored.manifest is not None:
            stored.manifest.plan = {}
    return _put(model, records_in(model, stored), name, strict)


def load_tensors(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "default",
                 strict: bool = True) -> LoadReport:
    """`load` for what is no file: PEFT's config as a dict, and tensors by PEFT's keys, which are copied."""
    stored = store.Stored(Path("(a state dict)/tensors"), dict(tensors), config=dict(config))
    model = unwrap(model)
    return _put(model, records_in(model, stored), name, strict)


def _put(model: nn.Module, reading: Reading, name: str, strict: bool) -> LoadReport:
    stored, weights, records, problems = reading
    existing = name in adapter_names(model)
    if stored.fingerprint is not None:
        started = {record.name for record in records if is_started(record)}
        problems += begun_elsewhere(stored.fingerprint, [weight for weight in weights if weight.name in started])
        note = held_otherwise(stored.fingerprint, weights)
        stored.notes += [] if note is None else [note]
    if existing:
        problems += _against_existing(model, name, records)
    if problems and strict:
        raise VeneerError(_listing(stored, problems))
    if not records:
        raise VeneerError(f"nothing in {stored.file} fits this model\n" + _listing(stored, problems))
    if not existing:
        _refuse_rewritten(weights, records)
        attach_records(model, weights, records, name, stored)
    filled = fill(model, name, records)
    count = sum(t.numel() for r in records for t in r.tensors.values())
    return LoadReport(stored.file.parent, name, stored.layout, filled, count, tuple(problems), tuple(stored.notes))


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
    # Without values: what is asked for is the method, and sharded tensors would have to be gathered.
    empty = {part: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for part, tensor in own.items()}
    known = [_meaning(method), _meaning(method.unmoved().plain(empty)[0])]
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
            for part, tensor in record.tensors.items() if _is_rounded(tensor, have[part].dtype)]


def _is_rounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    """A number of the tensor, not only its dtype, is lost in another dtype."""
    wide = torch.promote_types(tensor.dtype, dtype) == dtype
    return not wide and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


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


def attach_records(model: nn.Module, weights: list[Weight], records: list[Record], name: str,
                   stored: store.Stored) -> None:
    """Attach what the records say, by methods alone: `fill` gives the values. On the meta device nothing is started:
    whoever attaches there does that with each weight, or must not have any such record."""
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
    started = {record.name for record in records if is_started(record)}
    entries = [dataclasses.replace(entry, given=entry.name not in started or entry.weight.tensor.is_meta)
               for entry in made.entries]
    attach(model, dataclasses.replace(made, entries=entries), name, seed=seed or 0)


def _refuse_rewritten(weights: list[Weight], records: list[Record]) -> None:
    without = {weight.name for weight in weights if weight.tensor.is_meta}
    rewritten = {weight.name for weight in weights if moved(weight)}
    for record in records:
        if is_started(record) and record.name in without:
            raise VeneerError(f"load: the adapter of {record.name!r} begins at the base weight, which is on the meta "
                              "device and has no values yet; load the base model first")
        if is_started(record) and record.name in rewritten:
            raise VeneerError(f"load: the adapter of {record.name!r} begins at the base weight that it was trained on, "
                              "and the start of another adapter has rewritten that one here; load the base model anew")


def is_started(record: Record) -> bool:
    """The adapter must begin at the base weight, as it did in training, before it gets the record's values."""
    return bool(record.restarted) or record.method.moves_base


@torch.no_grad()
def fill(model: nn.Module, name: str, records: list[Record]) -> int:
    """Copy the tensors into the adapter's own parameters, which stay the objects they are."""
    by_name = {record.name: record for record in records}
    filled = 0
    for weight, adapter in attached(model, name):
        if weight.name in by_name:
            fill_adapter(adapter, by_name[weight.name])
            filled += 1
    return filled


def fill_adapter(adapter: Adapter, record: Record) -> None:
    own = adapter.state_dict()
    given = {k: spread_like(t, own[k]) if k in own else t for k, t in record.tensors.items()}
    adapter.unpack({part: own[part] for part in record.restarted} | given)
    adapter.pending, adapter.evidence = False, None


def _listing(stored: store.Stored, problems: list[str]) -> str:
    shown = problems[:SHOWN]
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"load: {stored.file} does not fit this model ({len(problems)} problems); the model is "
                        "unchanged. strict=False loads what fits", *shown, *more])

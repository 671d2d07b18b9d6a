"""save: one adapter of a model into a directory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from veneer.attach import adapter_names, attached, shared_states
from veneer.io import native, sites
from veneer.io.dialects import hf
from veneer.io.files import write_all
from veneer.io.fingerprint import Fingerprint, fingerprint
from veneer.io.manifest import META_BASE, META_CONFIG, META_MANIFEST, Manifest
from veneer.io.records import BaseMap, Record, base_map, base_weights, records_of
from veneer.io.sites import META_SITES
from veneer.io.store import MANIFEST, NATIVE_TENSORS, PEFT_CONFIG, PEFT_TENSORS, generation
from veneer.io.tensors import content_hash, read_metadata, write_tensors
from veneer.method import VeneerError, nearest
from veneer.weights import moved
from veneer.wrappers import unwrap


@dataclass(frozen=True)
class SaveReport:
    """What `save` did. format: "peft" or, with the reason why not, "native". bytes: of all files together."""

    path: Path
    format: str
    reason: str
    files: tuple[str, ...]
    bytes: int
    weights: int
    parameters: int
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        kind = "PEFT format" if self.format == "peft" else f"native format, PEFT cannot load it: {self.reason}"
        lines = [f"saved {self.weights} weights, {self.parameters:,} parameters, {self.bytes:,} bytes to {self.path}",
                 f"{kind} ({', '.join(self.files)})"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


#: PEFT's config, records, base → the config as another tool words it, and further files as text by name
Dress = Callable[[dict[str, Any], list[Record], BaseMap], tuple[dict[str, Any], dict[str, str]]]


def save(model: nn.Module, path: str | Path, name: str = "default", *, dress: Dress | None = None,
         values: Mapping[str, Mapping[str, Tensor]] | None = None) -> SaveReport:
    """Write the adapter `name` into the directory `path`, replacing the adapter that was there.

    In Hugging Face PEFT's format where its config can express the plan, else in the native one; the report
    says which and why. Tensors keep the dtype they were trained in; no byte of the base is written; a merged
    adapter is saved like any other. All at once: a save that fails or is killed leaves the old adapter or the
    new one. Other files in the directory are left alone. Never touches the network.
    dress: for a tool that writes PEFT's files in a way of its own; what they cannot hold is an error then. values:
    tensors to be written instead of the model's own, by weight and by their names in the adapter.

    Raises `VeneerError` for an unknown name, an adapter without values (meta device), or a write that failed.
    """
    model = unwrap(model)
    present = adapter_names(model)
    if name not in present:
        raise VeneerError(f"save: no adapter named {name!r} on this model{nearest(str(name), present) or '.'} "
                          f"It has: {', '.join(map(repr, present)) or 'none'}")
    records = records_of(model, name)
    for record in records:
        record.tensors |= (values or {}).get(record.name, {})
    weights = base_weights(model)
    base = base_map(model, weights)
    methods = {r.name: r.method for r in records}
    print_ = fingerprint(weights, methods)
    unknown = print_.unknown(methods)
    notes = [f"{unknown} base weights could not be read (merged for good, on meta or sharded) and "
             "are not part of the base's fingerprint"] if unknown else []
    notes += [note for state in shared_states(model, name) for note in state.notes()]
    notes += _on_rewritten(model, name)
    seed = _seed(model, name)
    try:
        plain = [plain_record(record) for record in records]
        config, tensors, more = hf.encode(plain, base)
        extra: dict[str, str] = {}
        if dress is not None:
            config, extra = dress(config, plain, base)
        return _write(Path(path), plain, base, print_, seed, tensors, config, "", notes + more, extra)
    except hf.Inexpressible as no:
        reason = str(no)
        if dress is not None:
            raise VeneerError(f"save: these files cannot hold the adapter {name!r}: {reason}") from None
    return _write(Path(path), records, base, print_, seed, native.encode(records), None, reason, notes)


def _on_rewritten(model: nn.Module, name: str) -> list[str]:
    """Weights that the start of another adapter has rewritten, so that the base as it was is the wrong one for this."""
    found = [weight.name for weight, adapter in attached(model, name)
             if moved(weight) and adapter.method is not None and not adapter.method.moves_base]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [f"the start of another adapter has rewritten the base weight {found[0]!r}{more}: this adapter belongs to "
            "the base as it is now, and no file of it says so"] if found else []


def plain_record(record: Record) -> Record:
    method, tensors = record.method.plain(record.tensors)
    return Record(record.name, method, dict(tensors))


@dataclass(frozen=True)
class Writing:
    """What goes into an adapter's directory. config: of PEFT's, or None for the native format, with the reason; about:
    the base, for the manifest; header: further entries of the tensor file's; extra: further files as text by name;
    drop: names of files that would describe it wrongly."""

    records: list[Record]
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] | None
    reason: str
    seed: int | None
    about: dict[str, Any]
    header: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


def _write(path: Path, records: list[Record], base: BaseMap, print_: Fingerprint, seed: int | None,
           tensors: Mapping[str, Tensor], config: dict | None, reason: str, notes: list[str],
           extra: Mapping[str, str] | None = None) -> SaveReport:
    about = {"class": base.class_name, "name_or_path": base.name_or_path, "weights": len(base.sites),
             "fingerprint": print_.digest()}
    header = {META_BASE: json.dumps(print_.to_dict(), separators=(",", ":")),
              META_SITES: sites.to_json(base, [record.name for record in records])}
    return write_adapter(path, Writing(records, tensors, config, reason, seed, about, header, extra or {}), notes)


def manifest_of(layout: str, writing: Writing, generation: int = 1) -> Manifest:
    """The manifest of what is about to be written."""
    count = sum(t.numel() for r in writing.records for t in r.tensors.values())
    return Manifest(layout, {r.name: r.method for r in writing.records}, content_hash(writing.tensors), count,
                    writing.seed, writing.reason, generation, writing.about,
                    {"veneer": _version(), "torch": torch.__version__})


def write_adapter(path: Path, writing: Writing, notes: list[str]) -> SaveReport:
    """Write an adapter's files into a directory, all at once, in the place of the adapter that was there."""
    config = writing.config
    layout = "native" if config is None else "peft"
    manifest = manifest_of(layout, writing, generation(path) + 1)
    text = manifest.to_json()
    meta = {"format": "pt", META_MANIFEST: text, **writing.header}
    files: list[tuple[str, Callable[[IO[bytes]], None]]] = []
    hide, drop = [], [PEFT_CONFIG, PEFT_TENSORS]  # the config first: without it PEFT loads nothing
    if config is not None:
        meta[META_CONFIG] = json.dumps(config, indent=2)
        hide, drop = _stale_config(path, meta[META_CONFIG]), [NATIVE_TENSORS]
        files.append((PEFT_CONFIG, functools.partial(write_text, meta[META_CONFIG])))
    files += [(each, functools.partial(write_text, content)) for each, content in writing.extra.items()]
    tensor_file = PEFT_TENSORS if config is not None else NATIVE_TENSORS
    files.insert(0, (tensor_file, lambda file: write_tensors(file, writing.tensors, meta)))
    files.append((MANIFEST, functools.partial(write_text, text)))
    size = write_all(path, files, hide=hide, drop=[*drop, *writing.drop])
    return SaveReport(path, layout, writing.reason, tuple(f for f, _ in files), size, len(writing.records),
                      manifest.parameters, tuple(notes))


def _stale_config(path: Path, new: str) -> list[str]:
    """The old config is to go before the new tensors come, so that PEFT never sees one with the other.

    Only where the old tensors carry their config themselves: else they would be unreadable if the save ended
    right then.
    """
    config = path / PEFT_CONFIG
    if not config.is_file() or config.read_bytes() == new.encode():
        return []
    tensors = path / PEFT_TENSORS
    return [PEFT_CONFIG] if tensors.is_file() and META_CONFIG in read_metadata(tensors) else []


def write_text(text: str, file: IO[bytes]) -> None:
    file.write(text.encode("utf-8"))


def _seed(model: nn.Module, name: str) -> int | None:
    keys = {adapter.seed_key.partition("/")[0] for _, adapter in attached(model, name)}
    seed = keys.pop() if len(keys) == 1 else ""
    return int(seed) if seed.lstrip("-").isdigit() else None


def _version() -> str:
    from veneer import __version__  # here: veneer/__init__ imports this module

    return __version__

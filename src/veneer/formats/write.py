"""Writing an adapter's files in any format, without its model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from veneer.formats.content import META_MODELOPT, META_STEMS, Content
from veneer.formats.read import MODELOPT_STATE, NEMO_SETTINGS
from veneer.io import native, sites, store
from veneer.io.dialects import hf, lycoris
from veneer.io.dialects.hf_names import is_target
from veneer.io.files import Writer, write_all
from veneer.io.manifest import META_MANIFEST
from veneer.io.records import Record
from veneer.io.save import Writing, manifest_of, plain_record, write_adapter, write_text
from veneer.io.sites import META_SITES
from veneer.io.tensors import write_tensors
from veneer.methods import LoHa, LoKr, LoRA

#: keys of PEFT's config that take some of what target_modules names away
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Written(NamedTuple):
    """What was written: files, bytes of all, and what the format does not say."""

    files: tuple[str, ...]
    bytes: int
    notes: list[str]


def targets(target: Path, form: str, name: str) -> list[Path]:
    """The files that `write` would replace if they are there."""
    if form in ("kohya", "lycoris"):
        return [target]
    if form == "modelopt":
        return [target / MODELOPT_STATE, *targets(target / name, "peft", name)]
    return [target / file for file in (store.PEFT_TENSORS, store.PEFT_CONFIG, store.NATIVE_TENSORS, store.MANIFEST,
                                       store.PEFT_PICKLE, MODELOPT_STATE)]


def write(content: Content, target: Path, form: str, name: str, prefix: str | None) -> Written:
    """Write the adapter. name: in a directory of ModelOpt's, whose others stay; prefix: of names in kohya's files.

    Raises `Inexpressible` where the format cannot hold it, and `VeneerError` where the disk does not.
    """
    if form in ("kohya", "lycoris"):
        return _one_file(content, target, form, prefix)
    if form == "modelopt":
        return _modelopt(content, target, name)
    if form == "native":
        return _directory(content, target, None, native.encode(content.records), "asked for", {}, [])
    content, notes = _plain(content)
    config, tensors, more = _peft(content)
    notes += more
    extra: dict[str, str] = {}
    if form == "nemo":
        from veneer.formats.nemo import dressed

        config, extra, more = dressed(content, config)
        notes += more
    return _directory(content, target, config, tensors, "", extra, notes)


def _plain(content: Content) -> tuple[Content, list[str]]:
    """Without starts, which only the native format holds."""
    records = [plain_record(record) for record in content.records]
    changed = [new.name for new, old in zip(records, content.records, strict=True) if new.method != old.method]
    notes = [f"the start of {changed[0]!r} (and {len(changed) - 1} more) is not kept: the same change is "
             "written as a plain LoRA"] if changed else []
    plain = Content(records, content.base, content.seed, content.about, content.header, config=content.config)
    return plain, notes


def _peft(content: Content) -> tuple[dict[str, Any], Mapping[str, Tensor], list[str]]:
    config, tensors, notes = hf.encode(content.records, content.base)
    if not content.base.known and _same_targets(content.config, config):
        config["target_modules"] = content.config["target_modules"]
    config["base_model_name_or_path"] = content.about.get("name_or_path")
    config["task_type"] = content.about.get("task_type") or config["task_type"]
    return config, tensors, notes


def _same_targets(said: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether what PEFT's config said of the adapted modules, in short names say, still means just those that are
    written: whoever trained the adapter knew which other modules there are."""
    targets, names = said.get("target_modules"), config["target_modules"]
    if not targets or not isinstance(names, list) or any(said.get(key) for key in _SELECTING):
        return False
    entries = [targets] if isinstance(targets, str) else targets
    return said.get("peft_type") == config["peft_type"] and all(
        any(is_target({"target_modules": entry if isinstance(targets, str) else [entry]}, name) for name in names)
        for entry in entries) and all(is_target({"target_modules": targets}, name) for name in names)


def _header(content: Content) -> dict[str, str]:
    return {**content.header, META_SITES: sites.to_json(content.base, [record.name for record in content.records])}


def _directory(content: Content, target: Path, config: dict[str, Any] | None, tensors: Mapping[str, Tensor],
               reason: str, extra: Mapping[str, str], notes: list[str]) -> Written:
    writing = Writing(content.records, tensors, config, reason, content.seed, content.about, _header(content), extra,
                      drop=() if NEMO_SETTINGS in extra else (NEMO_SETTINGS,))
    report = write_adapter(target, writing, notes)
    return Written(report.files, report.bytes, notes)


# -- ModelOpt's: its state file last, so that half a directory is none ---------------------------------------
def _modelopt(content: Content, target: Path, name: str) -> Written:
    from veneer.formats.modelopt import MODE, mode_of, other_modes

    mode, notes = mode_of(content, name)
    if META_MODELOPT in content.header:
        content.header[META_MODELOPT] = json.dumps(mode)
    others = other_modes(target / MODELOPT_STATE, name)
    if others:
        notes.append(f"{MODELOPT_STATE} was there already: what else it says ({len(others)} entries) stays in it")
    plain, more = _plain(content)
    notes += more
    try:
        config, tensors, _ = _peft(plain)
        written = _directory(plain, target / name, config, tensors, "", {}, notes)
    except hf.Inexpressible as no:
        tensors = native.encode(content.records)
        written = _directory(content, target / name, None, tensors, str(no), {}, notes)
    text = json.dumps({"modelopt_state_dict": [*others, [MODE, mode]]}, indent=1)
    size = write_all(target, [(MODELOPT_STATE, functools.partial(write_text, text))])
    files = (MODELOPT_STATE, *(f"{name}/{file}" for file in written.files))
    return Written(files, written.bytes + size, notes)


# -- kohya's and LyCORIS's ----------------------------------------------------------------------------------
def _one_file(content: Content, target: Path, form: str, prefix: str | None) -> Written:
    content, notes = _plain(content)
    modules = [content.base.sites[record.name].spots[0].module for record in content.records]
    stems = lycoris.stems_for(modules, prefix or (None if form == "kohya" else "lycoris"))
    methods = (LoRA,) if form == "kohya" else (LoRA, LoHa, LoKr)
    tensors = lycoris.encode(content.records, content.base.sites, stems, methods)
    writing = Writing(content.records, tensors, None, "", content.seed, content.about, {})
    meta = {"format": "pt", **_header(content), META_MANIFEST: manifest_of(form, writing).to_json(),
            META_STEMS: json.dumps({stem: module for module, stem in stems.items()}), **_network(content.records, form)}
    writer: Writer = lambda file: write_tensors(file, tensors, meta)  # noqa: E731
    size = write_all(target.parent, [(target.name, writer)])
    if any(record.method.uses_input for record in content.records):
        notes.append("dropout is in the file's header alone, where only Veneer looks for it")
    return Written((target.name,), size, notes)


def _network(records: list[Record], form: str) -> dict[str, str]:
    """What kohya's scripts write about a network, where it is one number."""
    found = {"ss_network_module": "networks.lora" if form == "kohya" else "lycoris.kohya"}
    pairs = {(record.method.rank, record.method.alpha) for record in records if isinstance(record.method, LoRA)}
    if len(pairs) == 1 and all(isinstance(record.method, LoRA) for record in records):
        (rank, alpha), = pairs
        found |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank if alpha is None else alpha)}
    return found

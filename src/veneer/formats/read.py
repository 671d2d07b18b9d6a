"""Reading an adapter's files in any format, without its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.formats.base import GIVE, Hint, Known, stand_in
from veneer.formats.content import META_MODELOPT, META_NEMO, META_STEMS, Content
from veneer.formats.hints import peft_hints
from veneer.io import native, sites, store
from veneer.io.dialects import hf, lycoris
from veneer.io.fingerprint import Fingerprint
from veneer.io.manifest import META_BASE, META_MANIFEST, Manifest, base_of, parse_json, read_json
from veneer.io.reading import as_planned, fitting
from veneer.io.records import BaseMap, Record, near
from veneer.io.sites import META_SITES
from veneer.io.structure import listed
from veneer.io.tensors import content_hash, read_metadata, read_sizes, read_tensors
from veneer.method import VeneerError

#: names of the files by which the front doors' directories are known
NEMO_SETTINGS, MODELOPT_STATE = "automodel_peft_config.json", "modelopt_state.json"
_CARRIED = (META_BASE, META_NEMO, META_MODELOPT, META_STEMS)


def detect(source: Path) -> str:
    """The format of what is at a path. Raises `VeneerError` where there is no adapter."""
    if source.is_dir() and (source / MODELOPT_STATE).is_file():
        return "modelopt"
    file = store.find(source)
    if file.suffix == ".safetensors":
        keys, meta = read_sizes(file), read_metadata(file)
        if META_MANIFEST in meta:
            layout = Manifest.from_json(meta[META_MANIFEST], f"the manifest in {file}").layout
            if layout not in ("peft", "native"):
                return layout
        elif lycoris.is_dialect(keys):
            return "kohya" if all(key.partition(".")[2] in _KOHYA for key in keys) else "lycoris"
    if file.name == store.NATIVE_TENSORS:
        return "native"
    return "nemo" if (file.parent / NEMO_SETTINGS).is_file() else "peft"


_KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")


def read(source: Path, form: str, given: Known, prefix: str | None) -> Content:
    """What is at `source`, which is of the format `form`. given: what the caller knows of the base.

    Raises `VeneerError` for damaged files, and where they and `given` do not tell what the weights are.
    """
    if form == "modelopt":
        return _modelopt(source, given)
    if form in ("kohya", "lycoris"):
        return _one_file(store.find(source), given, prefix)
    stored = store.read(source)
    content = _native(stored, given) if stored.layout == "native" else _peft(stored, given)
    if form == "nemo":
        settings = stored.file.parent / NEMO_SETTINGS
        if settings.is_file():
            content.header[META_NEMO] = json.dumps(read_json(settings))
        if stored.manifest is None or not stored.manifest.plan:
            from veneer.formats.nemo import as_trained

            content.records = as_trained(content.records, source)
    return content


# -- PEFT's files and the native ones -----------------------------------------------------------------------
def _peft(stored: store.Stored, given: Known) -> Content:
    assert stored.config is not None
    base = _base(stored.metadata, stored.fingerprint, given, str(stored.file))
    if base is None:
        hints = peft_hints(stored.config, stored.tensors, bool(given.sizes or given.exact))
        base = stand_in(hints, given)
    reading = hf.decode(stored.config, stored.tensors, base)
    problems = list(reading.problems)
    problems += [f"the file carries the base weight {path!r}, which is not trained (a resized vocabulary?): load "
                 "it onto the model, and save it from there" for path in reading.base]
    records = list(reading.records.values())
    started = [record.name for record in records if record.restarted]
    if started:
        problems.append(f"the file is relative to the base without its start ({started[0]!r}), which only the base "
                        "itself can tell: load it onto the model, and save it from there")
    if stored.manifest is not None and stored.manifest.plan:
        records = as_planned(records, stored.manifest.plan)
    content = _content(stored.manifest, stored.metadata, base, _whole(records, base, problems, stored.file, given))
    content.notes = [*stored.notes, *reading.notes]
    content.about["task_type"] = stored.config.get("task_type")
    if not content.about.get("name_or_path"):
        content.about["name_or_path"] = stored.config.get("base_model_name_or_path")
    if stored.manifest is None and any(content.base.sites[r.name].spots[0].kind == "conv" for r in content.records):
        content.notes.append("whether a convolution has groups or a dilation is not in PEFT's files: it was taken for "
                             "an ordinary one")
    return content


def _native(stored: store.Stored, given: Known) -> Content:
    assert stored.manifest is not None
    base = _base(stored.metadata, stored.fingerprint, given, str(stored.file))
    if base is None:
        raise VeneerError(f"convert: {stored.file} does not say what kinds of layers its weights are of. {GIVE} from "
                          "which transformers can make it, or the model itself")
    records, unknown = native.decode(stored.manifest.plan, stored.tensors)
    problems = [f"unexpected: {key!r}" for key in unknown]
    return _content(stored.manifest, stored.metadata, base, _whole(records, base, problems, stored.file, given))


def _base(meta: Mapping[str, str], print_: Fingerprint | None, given: Known, where: str) -> BaseMap | None:
    """The whole map that is given, or else the one in the file's header; None where neither is there."""
    if given.exact is not None:
        return given.exact
    if META_SITES in meta and not given.sizes:
        return sites.from_json(meta[META_SITES], print_, f"{META_SITES} in the header of {where}")
    return None


def _whole(records: list[Record], base: BaseMap, problems: list[str], file: Path, given: Known) -> list[Record]:
    """The records, each of them whole. Raises `VeneerError` with everything that is wrong."""
    good, unfit = fitting(records, base)
    problems = [*problems, *unfit]
    if not given.sizes and given.exact is None and any("wrong shape" in text for text in unfit):
        problems.append(f"if these are convolutions, their kernels are not to be seen in the file. {GIVE}")
    if problems or not good:
        raise VeneerError(listed(f"convert: {file} cannot be converted ({len(problems)} problems); nothing was written",
                                 problems or ["it has no adapter's tensors"]))
    order = {name: i for i, name in enumerate(base.sites)}
    return sorted(good, key=lambda record: order[record.name])


def _content(manifest: Manifest | None, meta: Mapping[str, str], base: BaseMap, records: list[Record]) -> Content:
    content = Content(records, base, header={key: meta[key] for key in _CARRIED if key in meta})
    if manifest is not None:
        content.seed, content.about = manifest.seed, dict(manifest.base)
    return content


# -- kohya's and LyCORIS's ----------------------------------------------------------------------------------
def _one_file(file: Path, given: Known, prefix: str | None) -> Content:
    tensors, meta = read_tensors(file)
    groups = lycoris.grouped(tensors)
    manifest = _manifest(file, tensors, meta)
    print_ = base_of(meta[META_BASE]) if META_BASE in meta else None
    base = _base(meta, print_, given, str(file))
    stems = parse_json(meta[META_STEMS], f"{META_STEMS} in {file}") if META_STEMS in meta else {}
    if base is None or any(stem not in stems for stem in groups):
        stems = _stems(file, groups, given, prefix)
    if base is None:
        base = stand_in({f"{module}.weight": _hint(groups[stem], f"{module}.weight", given)
                         for stem, module in stems.items()}, given)
    where = {stem: base.by_path.get(f"{stems[stem]}.weight") for stem in groups}
    problems = [f"{stem!r} is of {stems[stem]!r}, which is not in the base{near(stems[stem], base.modules, [])}"
                for stem, site in where.items() if site is None]
    if problems:
        raise VeneerError(listed(f"convert: {file} is of another base", problems))
    plan = manifest.plan if manifest is not None else {}
    records = lycoris.decode(groups, {stem: site for stem, site in where.items() if site is not None}, plan)
    content = _content(manifest, meta, base, _whole(as_planned(records, plan), base, [], file, given))
    if META_MANIFEST in meta and manifest is None:
        content.notes.append(f"{file.name} was changed after Veneer wrote it; what its header says of the methods was "
                             "not used")
    return content


def _manifest(file: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> Manifest | None:
    """What Veneer has written into the header, if the tensors are still those."""
    if META_MANIFEST not in meta:
        return None
    manifest = Manifest.from_json(meta[META_MANIFEST], f"the manifest in {file}")
    return manifest if content_hash(tensors) == manifest.tensors_sha256 else None


def _stems(file: Path, groups: Mapping[str, Any], given: Known, prefix: str | None) -> dict[str, str]:
    """stem → module, by the names in the base."""
    modules = given.modules()
    if not modules:
        raise VeneerError(f"convert: {file} has names such as {next(iter(groups))!r}, in which dots and underscores "
                          f"are the same, so that the modules' names are not to be seen. {GIVE}")
    prefixes = lycoris.PREFIXES if prefix is None else (prefix,)
    found = lycoris.modules_for(groups, modules, prefixes)
    problems = []
    for stem, means in found.items():
        if len(means) > 1:
            problems.append(f"{stem!r} may be {' or '.join(map(repr, means[:3]))}")
        elif not means:
            known = [f"{each}_{lycoris.flat(module)}" for module in modules for each in prefixes]
            problems.append(f"{stem!r} is no module of the base{near(stem, known, problems)}")
    if problems:
        raise VeneerError(listed(f"convert: {file} does not fit the base ({len(problems)} of {len(groups)} names). The "
                                 f"prefixes looked for: {', '.join(prefixes)} (prefix=, --prefix)", problems))
    return {stem: means[0] for stem, means in found.items()}


def _hint(pieces: Mapping[str, Tensor], path: str, given: Known) -> Hint:
    size = given.sizes.get(path)
    shape = tuple(size.shape) if size is not None else ()
    return Hint("conv" if len(shape) > 2 else "linear", shape)


# -- ModelOpt's ---------------------------------------------------------------------------------------------
def _modelopt(source: Path, given: Known) -> Content:
    data = read_json(source / MODELOPT_STATE)
    try:
        modes = [mode for kind, mode in data["modelopt_state_dict"] if kind == "peft"]
        found = {mode["config"].get("adapter_name", "default"): mode for mode in modes}
        off = {name: mode["metadata"]["off"] for name, mode in found.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VeneerError(f"{source / MODELOPT_STATE} is damaged: {type(error).__name__}: {error}") from error
    if len(found) != 1:
        raise VeneerError(f"convert: {source} has {len(found)} adapters ({', '.join(sorted(found)) or 'none'}), and "
                          f"other formats hold one: give the directory of one of them, such as "
                          f"{source / next(iter(sorted(found)), 'NAME')}")
    (name, mode), = found.items()
    if off[name]:
        raise VeneerError(f"convert: the adapter {name!r} is off in {len(off[name])} layers ({off[name][0]!r}), which "
                          "no other format can say: switch it on there, or detach it")
    stored = store.read(source / name)
    content = _native(stored, given) if stored.layout == "native" else _peft(stored, given)
    content.header[META_MODELOPT] = json.dumps(mode)
    return content

"""Reading an adapter's files in any format, without its model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.formats.base import GIVE, GIVE_WHOLE, Hint, Known, stand_in
from veneer.formats.content import META_MODELOPT, META_NEMO, META_STEMS, Content
from veneer.formats.hints import peft_hints
from veneer.io import native, sites, store
from veneer.io.dialects import hf, lycoris
from veneer.io.dialects.hf_base import PREFIX
from veneer.io.fingerprint import Fingerprint
from veneer.io.manifest import META_BASE, META_MANIFEST, Manifest, base_of, parse_json, read_json
from veneer.io.reading import as_planned, fitting
from veneer.io.records import BaseMap, Record, near
from veneer.io.sites import META_SITES
from veneer.io.structure import listed
from veneer.io.tensors import content_hash, read_metadata, read_sizes, read_tensors
from veneer.method import Method, VeneerError, nearest
from veneer.methods import DoRA, LoRA

#: names of the files by which the front doors' directories are known
NEMO_SETTINGS, MODELOPT_STATE = "automodel_peft_config.json", store.MODELOPT_STATE
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


def read(source: Path, form: str, given: Known, prefix: str | None, name: str | None = None,
         changed: bool = False) -> Content:
    """What is at `source`, which is of the format `form`. given: what the caller knows of the base; prefix, changed:
    of kohya's and LyCORIS's files, see `convert_file`; name: which adapter in a directory of ModelOpt's.

    Raises `VeneerError` for damaged files, and where they and `given` do not tell what the weights are.
    """
    if form == "modelopt":
        return _modelopt(source, given, name)
    if form in ("kohya", "lycoris"):
        return _one_file(store.find(source), given, prefix, changed)
    stored = store.read(source)
    content = _native(stored, given) if stored.layout == "native" else _peft(stored, given)
    if form == "nemo":
        settings = stored.file.parent / NEMO_SETTINGS
        strange = next((record for record in content.records if not isinstance(_inner(record), LoRA)), None)
        if strange is not None and not settings.is_file():
            raise VeneerError(f"convert: {source} is in the format peft ({strange.name!r} has {strange.method}), not "
                              "nemo: NeMo's files hold LoRA and DoRA")
        if settings.is_file():
            content.header[META_NEMO] = json.dumps(read_json(settings))
        if stored.manifest is None or not stored.manifest.plan:
            from veneer.formats.nemo import as_trained

            content.records = as_trained(content.records, source)
    return content


def _inner(record: Record) -> Method:
    return record.method.inner if isinstance(record.method, DoRA) else record.method


def _on_any(keys: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether one of PEFT's keys is of one of these modules."""
    starts = tuple(f"{PREFIX}{module}." for module in modules)
    return any(key.startswith(starts) for key in keys)


def _another_base(file: Path, name: str, base: Iterable[str]) -> VeneerError:
    """None of the modules that a file is about is in the base that the caller gives."""
    example = next((module for module in base if module), None)
    has = f"such as {example!r}" if example else "none that holds a weight"
    return VeneerError(f"convert: {file} is of another base model than the one that is given (base=, --base): none of "
                       f"its names is in it. The file has names such as {name!r}; modules of that base: {has}")


# -- PEFT's files and the native ones -----------------------------------------------------------------------
def _peft(stored: store.Stored, given: Known) -> Content:
    assert stored.config is not None
    base = _base(stored.metadata, stored.fingerprint, given, str(stored.file))
    if base is None:
        hints = peft_hints(stored.config, stored.tensors, bool(given.sizes or given.exact))
        base = stand_in(hints, given)
    reading = hf.decode(stored.config, stored.tensors, base)
    if given.told and not reading.records and stored.tensors and not _on_any(stored.tensors, given.modules()):
        raise _another_base(stored.file, min(stored.tensors), given.modules())
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
    content.notes, content.config = [*stored.notes, *reading.notes], stored.config
    content.about["task_type"] = stored.config.get("task_type")
    if not content.about.get("name_or_path"):
        content.about["name_or_path"] = stored.config.get("base_model_name_or_path")
    if stored.manifest is None and any(content.base.sites[r.name].spots[0].kind == "conv" for r in content.records):
        content.notes.append("whether a convolution has groups or a dilation is not in PEFT's files: it was taken for "
                             "an ordinary one")
    return content


def _native(stored: store.Stored, given: Known) -> Content:
    assert stored.manifest is not None
    # Sizes alone tell less than the header does.
    base = _base(stored.metadata, stored.fingerprint, Known(given.exact), str(stored.file))
    if base is None:
        raise VeneerError(f"convert: {stored.file} does not say what kinds of layers its weights are of. {GIVE_WHOLE}")
    records, unknown = native.decode(stored.manifest.plan, stored.tensors)
    problems = [f"unexpected: {key!r}" for key in unknown]
    places = {record.name: [spot.path for spot in base.sites[record.name].spots] if record.name in base.sites else []
              for record in records}
    absent = [name for name, paths in places.items()
              if not paths or (given.sizes and not any(path in given.sizes for path in paths))]
    if given.told and absent and len(absent) == len(records):
        raise _another_base(stored.file, absent[0], given.modules())
    if given.sizes:
        problems += [f"{name!r} is not in the base that is given" for name in absent]
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
def _one_file(file: Path, given: Known, prefix: str | None, changed: bool) -> Content:
    tensors, meta = read_tensors(file)
    manifest = _manifest(file, tensors, meta, changed)
    groups = lycoris.grouped(tensors)
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
    content.notes += lycoris.without_alpha(groups)
    return content


def _manifest(file: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str], changed: bool) -> Manifest | None:
    """What Veneer has written into the header; None where it wrote none, or where the tensors are other ones and
    `changed` says that this is meant."""
    if META_MANIFEST not in meta:
        return None
    manifest = Manifest.from_json(meta[META_MANIFEST], f"the manifest in {file}")
    if content_hash(tensors) == manifest.tensors_sha256:
        return manifest
    if not changed:
        raise VeneerError(f"convert: {file} is damaged, or another tool has changed it: its tensors are not the ones "
                          "that Veneer wrote (SHA-256 differs). Copy or write it again; if it was changed on purpose, "
                          "changed=True (--changed) takes its tensors as they are")
    return None


def _stems(file: Path, groups: Mapping[str, Any], given: Known, prefix: str | None) -> dict[str, str]:
    """stem → module, by the names in the base."""
    modules = given.modules()
    if not given.told:
        raise VeneerError(f"convert: {file} has names such as {next(iter(groups))!r}, in which dots and underscores "
                          f"are the same, so that the modules' names are not to be seen. {GIVE}")
    prefixes = lycoris.PREFIXES if prefix is None else (prefix,)
    found = lycoris.modules_for(groups, modules, prefixes)
    looked = f"The prefixes looked for: {', '.join(prefixes)} (prefix=, --prefix)"
    if not any(found.values()):
        raise _no_stem(file, list(groups), modules, looked)
    problems = []
    for stem, means in found.items():
        if len(means) > 1:
            problems.append(f"{stem!r} may be {' or '.join(map(repr, means[:3]))}")
        elif not means:
            known = [f"{each}_{lycoris.flat(module)}" for module in modules for each in prefixes]
            problems.append(f"{stem!r} is no module of the base{near(stem, known, problems)}")
    if problems:
        raise VeneerError(listed(f"convert: {file} does not fit the base ({len(problems)} of {len(groups)} names). "
                                 f"{looked}", problems))
    return {stem: means[0] for stem, means in found.items()}


def _no_stem(file: Path, stems: list[str], modules: list[str], looked: str) -> VeneerError:
    """None of a file's names is understood: they have another prefix, or are of another base."""
    others = lycoris.prefixes_of(stems, modules)
    if others:
        return VeneerError(f"convert: the names in {file}, such as {stems[0]!r}, end like modules of the base and have "
                           f"another prefix. {looked}; {' or '.join(map(repr, others))} would fit")
    return VeneerError(f"{_another_base(file, stems[0], modules)}. {looked}")


def _hint(pieces: Mapping[str, Tensor], path: str, given: Known) -> Hint:
    size = given.sizes.get(path)
    shape = tuple(size.shape) if size is not None else ()
    return Hint("conv" if len(shape) > 2 else "linear", shape)


# -- ModelOpt's ---------------------------------------------------------------------------------------------
def modelopt_modes(source: Path) -> dict[str, dict[str, Any]]:
    """What the state file in a directory of ModelOpt's says of each adapter, by name. Raises `VeneerError` for a file
    that is damaged."""
    data = read_json(source / MODELOPT_STATE)
    try:
        modes = [mode for kind, mode in data["modelopt_state_dict"] if kind == "peft"]
        found = {mode["config"].get("adapter_name", "default"): mode for mode in modes}
        for mode in found.values():
            list(mode["metadata"]["off"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VeneerError(f"{source / MODELOPT_STATE} is damaged: {type(error).__name__}: {error}") from error
    return found


def _wanted(source: Path, found: Mapping[str, Any], name: str | None) -> str:
    """The adapter that is asked for, or the only one."""
    has = f"{source} has {len(found)} adapters ({', '.join(sorted(found)) or 'none'})"
    if name is not None:
        if name not in found:
            raise VeneerError(f"convert: there is no adapter {name!r} (name=, --name): {has}{nearest(name, found)}")
        return name
    if len(found) != 1:
        raise VeneerError(f"convert: {has}, and other formats hold one: name= (--name) says which, such as "
                          f"{next(iter(sorted(found)), 'NAME')!r}")
    return next(iter(found))


def _modelopt(source: Path, given: Known, wanted: str | None) -> Content:
    found = modelopt_modes(source)
    name = _wanted(source, found, wanted)
    mode = found[name]
    off = mode["metadata"]["off"]
    if off:
        raise VeneerError(f"convert: the adapter {name!r} is off in {len(off)} layers ({off[0]!r}), which no other "
                          "format can say: switch it on there, or detach it")
    stored = store.read(source / name)
    content = _native(stored, given) if stored.layout == "native" else _peft(stored, given)
    content.header[META_MODELOPT] = json.dumps(mode)
    return content

"""convert_file: an adapter's files from one format into another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from veneer.formats.base import known
from veneer.formats.content import FORMATS, Content
from veneer.formats.read import MODELOPT_STATE, detect, modelopt_modes, read
from veneer.formats.write import targets, write
from veneer.io.dialects.hf_base import Inexpressible, way_out
from veneer.io.dialects.lycoris import PREFIXES
from veneer.method import VeneerError, nearest

_FILES = ("kohya", "lycoris")


@dataclass(frozen=True)
class ConvertReport:
    """What `convert_file` did. source_format, format: of `FORMATS`; bytes: of all files together; notes: what the new
    files do not say, though it changes nothing that the adapter computes."""

    source: Path
    target: Path
    source_format: str
    format: str
    files: tuple[str, ...]
    bytes: int
    weights: int
    parameters: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"converted {self.weights} weights, {self.parameters:,} numbers, {self.bytes:,} bytes: "
                 f"{self.source} ({self.source_format}) to {self.target} ({self.format}: {', '.join(self.files)})"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert_file(source: str | Path, target: str | Path, to: str, base: str | Path | nn.Module | None = None, *,
                 from_: str | None = None, prefix: str | None = None, name: str | None = None,
                 changed: bool = False, overwrite: bool = False) -> ConvertReport:
    """Write the adapter at `source` to `target` in another format. Needs no model.

    source: a directory or a file. target: a directory, or for kohya and lycoris a .safetensors file. to, from_: of
    `FORMATS`; from_ None: what the files look like. base: what the source does not tell of its base model is taken from
    here: a folder with config.json or safetensors files (of which only the headers are read), such a file, or a model.
    prefix: of the names in kohya's and LyCORIS's files, such as "lora_te"; None: those that are usual. name: of the
    adapter in a directory of ModelOpt's: in the source which of several is read, in the target what it is called; None:
    the only one, and the name that it had in ModelOpt, else "default". changed: read a file of kohya's or LyCORIS's
    that another tool has changed since Veneer wrote it, by its tensors alone. overwrite: replace an adapter that is
    there; in a directory of ModelOpt's the one of that name, and others stay.

    What is written holds the same numbers, bit for bit, and its header the whole plan, so that converting it back gives
    the same again. Raises `VeneerError`, with nothing written, where the format cannot hold something that changes what
    the adapter computes, naming that; where the source is damaged or does not tell enough; and where something is at
    `target` already.
    """
    source, target = Path(source), Path(target)
    for option, value in (("to", to), ("from_", from_)):
        if value is not None and value not in FORMATS:
            raise VeneerError(f"convert: unknown format {option}={value!r}{nearest(value, FORMATS) or '.'} Known: "
                              f"{', '.join(FORMATS)}")
    form = _format(source, from_)
    _check_kind(target, to)
    _check_options(source, form, to, prefix, name, changed)
    content = read(source, form, known(base), prefix, _read_name(source, form, to, name), changed)
    name = _settled(content, to) if name is None else name
    _check_free(source, target, to, name, overwrite)
    try:
        written = write(content, target, to, name, prefix)
    except Inexpressible as no:
        # PEFT has the other methods, but not on all kinds of layers and not beside each other.
        hints = (way_out(record.method, with_dora=True) for record in content.records if to == "peft")
        raise VeneerError(f"convert: {source} cannot be converted to {to}, which would lose this: {no}"
                          f"{next(filter(None, hints), '')}. Nothing was written") from None
    count = sum(tensor.numel() for record in content.records for tensor in record.tensors.values())
    return ConvertReport(source, target, form, to, written.files, written.bytes, len(content.records), count,
                         tuple(dict.fromkeys([*content.notes, *written.notes])))


def _format(source: Path, said: str | None) -> str:
    """What the files look like, or of formats that look alike the one that is said."""
    found = detect(source)
    if said is None or said == found:
        return found
    if (said, found) == ("lycoris", "kohya") or {said, found} == {"peft", "nemo"}:  # LyCORIS has LoRA as kohya has it
        return said
    alone = ": what it holds is more than LoRA, and kohya's files hold that alone" if said in _FILES else ""
    raise VeneerError(f"convert: {source} is in the format {found}, not {said}{alone if found in _FILES else ''}")


def _check_options(source: Path, form: str, to: str, prefix: str | None, name: str | None, changed: bool) -> None:
    """Refuse options that would have no effect."""
    formats = f"{source} is in the format {form} and is to be in {to}"
    if prefix is not None and not {form, to} & set(_FILES):
        raise VeneerError(f"convert: prefix={prefix!r} (--prefix) is of kohya's and LyCORIS's files, and {formats}")
    if prefix is not None and (not prefix or "." in prefix):
        raise VeneerError(f"convert: prefix={prefix!r} (--prefix) cannot begin the names in such a file: give one such "
                          f"as 'lora_te', or leave it out for the usual ones ({', '.join(PREFIXES)})")
    if name is not None and "modelopt" not in (form, to):
        raise VeneerError(f"convert: name={name!r} (--name) is of ModelOpt's directories, and {formats}")
    if changed and form not in _FILES:
        raise VeneerError(f"convert: changed=True (--changed) is for kohya's and LyCORIS's files, and {formats}")


def _read_name(source: Path, form: str, to: str, name: str | None) -> str | None:
    """The adapter that `name` picks in the source. From ModelOpt's to ModelOpt's it is a new name for the only one."""
    if form != "modelopt" or (to == "modelopt" and len(modelopt_modes(source)) == 1):
        return None
    return name


def _settled(content: Content, to: str) -> str:
    """The name of an adapter that is given none. Only ModelOpt's directories have names."""
    if to != "modelopt":
        return "default"
    from veneer.formats.modelopt import DEFAULT, name_of

    return name_of(content) or DEFAULT


def _check_kind(target: Path, to: str) -> None:
    if to in _FILES:
        if target.suffix != ".safetensors" or target.is_dir():
            raise VeneerError(f"convert: {to} is one file: give a target that ends in .safetensors, not {target}")
    elif target.suffix == ".safetensors" or target.is_file():
        raise VeneerError(f"convert: {to} is a directory ({FORMATS[to]}), and {target} is a file's name")


def _check_free(source: Path, target: Path, to: str, name: str, overwrite: bool) -> None:
    """Refuse what is not to be written over. name: the one that is written."""
    if Path(name).name != name or name in ("", "..", MODELOPT_STATE):
        raise VeneerError(f"convert: name={name!r} is to be that of a directory")
    there = [path for path in targets(target, to, name) if path.exists()]
    folder = os.path.realpath(source.parent if source.is_file() else source)
    places = {target} if to != "modelopt" else {target, target / name}
    if there and to not in _FILES and folder in map(os.path.realpath, places):
        raise VeneerError(f"convert: {target} is where the source is; give another directory")
    if to not in (*_FILES, "modelopt") and (target / MODELOPT_STATE).is_file():
        raise VeneerError(f"convert: {target} is a directory of ModelOpt's adapters; give another one")
    if there and not overwrite:
        stay = f" (the adapter {name!r}; others there stay)" if to == "modelopt" else ""
        raise VeneerError(f"convert: {there[0]} is there already; overwrite=True (--overwrite) replaces it{stay}")

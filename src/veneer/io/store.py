"""Finding and reading what is at a path: Veneer's own directories, PEFT's, or one file beside its config."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.io.fingerprint import Fingerprint
from veneer.io.manifest import (
    META_BASE,
    META_CONFIG,
    META_MANIFEST,
    Manifest,
    base_of,
    parse_json,
    read_json,
    read_text,
)
from veneer.io.tensors import content_hash, read_metadata, read_tensors
from veneer.method import VeneerError

PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PICKLE = "adapter_model.bin"
NATIVE_TENSORS, MANIFEST = "veneer.safetensors", "veneer.json"
#: by which a directory of veneer.modelopt's is known; its adapters are in directories inside
MODELOPT_STATE = "modelopt_state.json"


@dataclass
class Stored:
    """What was read: tensors by key and what the files say about them; metadata: of a safetensors file's header."""

    file: Path
    tensors: dict[str, Tensor]
    manifest: Manifest | None = None
    fingerprint: Fingerprint | None = None
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        return self.manifest.layout if self.manifest else "peft"


def read(path: str | Path, allow_pickle: bool = False) -> Stored:
    """Read the adapter at a local path: a directory, or a tensor file.

    Never touches the network. Raises `VeneerError` when there is none, when a file is cut off, damaged or does
    not belong to its neighbours, and for a pickle file unless `allow_pickle`.
    """
    file = find(Path(path))
    if file.suffix != ".safetensors":
        return Stored(file, _read_pickle(file, allow_pickle), config=_config_beside(file))
    tensors, meta = read_tensors(file)
    beside = file.parent / MANIFEST
    if META_MANIFEST in meta:
        found = _embedded(file, tensors, meta)
    else:
        found = Stored(file, tensors)
        if beside.is_file():
            _adopt(found, beside)
    found.metadata = meta
    if found.layout == "peft" and found.config is None:
        found.config = _config_beside(file)
    return found


def find(path: Path) -> Path:
    """The tensor file that is the adapter at `path`."""
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise VeneerError(f"{path} is not an adapter file: give the directory, or the .safetensors file in it")
        return path
    if not path.is_dir():
        raise VeneerError(f"there is nothing at {path}. load and info read local paths and never download")
    native, peft = path / NATIVE_TENSORS, path / PEFT_TENSORS
    if native.is_file() and peft.is_file():
        return _newer(native, peft)
    for file in (native, peft, path / PEFT_PICKLE):
        if file.is_file():
            return file
    if (path / MODELOPT_STATE).is_file():
        raise VeneerError(_of_modelopt(path))
    inside = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))[:8]
    raise VeneerError(f"no adapter in {path}: expected {PEFT_TENSORS} (or {NATIVE_TENSORS}); it has: "
                      f"{', '.join(inside) or 'nothing'}")


def _of_modelopt(path: Path) -> str:
    """What to do with a directory of ModelOpt's, which may have several adapters."""
    files = NATIVE_TENSORS, PEFT_TENSORS
    names = sorted(inner.name for inner in path.iterdir() if any((inner / file).is_file() for file in files))
    one = f"give the directory of one of them, such as {path / names[0]}" if names else "it has none"
    return (f"{path} is in ModelOpt's format ({MODELOPT_STATE}), with its adapters in directories of their own "
            f"({', '.join(names) or 'none'}): {one}. Or convert it: `veneer convert {path} DIRECTORY --to peft"
            f"{' --name ' + names[0] if len(names) > 1 else ''}`. veneer.modelopt.restore reads it as it is")


def generation(directory: Path) -> int:
    """A number that grows with every save into a directory; 0 where Veneer has saved nothing yet."""
    files = [directory / NATIVE_TENSORS, directory / PEFT_TENSORS]
    return max((_generation(file) for file in files if file.is_file()), default=0)


def _generation(file: Path) -> int:
    # Not by reading the whole manifest: a file that cannot be understood here can still be replaced.
    found = re.search(r'"generation": (\d+)', read_metadata(file).get(META_MANIFEST, ""))
    return int(found[1]) if found else 0


def _newer(native: Path, peft: Path) -> Path:
    # A save that changed the format and was cut off before its last step leaves both: the later one counts.
    ours, theirs = _generation(native), _generation(peft)
    if not theirs and peft.stat().st_mtime > native.stat().st_mtime:
        raise VeneerError(f"two adapters in {native.parent}: {native.name}, and {peft.name}, which another tool "
                          "wrote later. Name the file to load, or remove one of them")
    return native if ours >= theirs else peft


def _embedded(file: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> Stored:
    """A file of Veneer's own: its header is the truth, the files beside it are copies."""
    text = meta[META_MANIFEST]
    manifest = Manifest.from_json(text, f"the manifest in {file}")
    if manifest.layout not in ("peft", "native"):
        raise VeneerError(f"{file} is in {manifest.layout}'s format, which is not loaded as it is: "
                          f"`veneer convert {file} DIRECTORY --to peft` (or convert_file) makes one that is")
    if content_hash(tensors) != manifest.tensors_sha256:
        raise VeneerError(f"{file} is damaged: its tensors are not the ones that were saved (SHA-256 differs). "
                          "Nothing was loaded; copy or save it again")
    found = Stored(file, tensors, manifest)
    if META_BASE in meta:
        found.fingerprint = base_of(meta[META_BASE])
    if META_CONFIG not in meta:
        return found
    found.config = parse_json(meta[META_CONFIG], f"the config in {file}")
    config, beside = file.parent / PEFT_CONFIG, file.parent / MANIFEST
    whole = beside.is_file() and beside.read_bytes() == text.encode()  # else a save was cut off here
    if whole and config.is_file():
        edited = read_json(config)
        if edited != found.config:
            found.notes.append(f"{PEFT_CONFIG} was edited after the save; what it says was used")
            found.config = edited
            manifest.plan = {}
    return found


def _adopt(found: Stored, beside: Path) -> None:
    """A tensor file whose header has lost the manifest: the one beside it, if it is about these very tensors."""
    manifest = Manifest.from_json(read_text(beside), str(beside))
    if content_hash(found.tensors) == manifest.tensors_sha256:
        found.manifest = manifest
        return
    if found.file.name == NATIVE_TENSORS:
        raise VeneerError(f"{found.file} and {beside} do not belong together (SHA-256 differs)")
    found.notes.append(f"{MANIFEST} is about other tensors and was not used: another tool wrote {found.file.name}")


def _config_beside(file: Path) -> dict[str, Any]:
    config = file.parent / PEFT_CONFIG
    if not config.is_file():
        raise VeneerError(f"{file.name} has no {PEFT_CONFIG} beside it in {file.parent}, and without it the scale of "
                          "an adapter is not known")
    return read_json(config)


def _read_pickle(file: Path, allow: bool) -> dict[str, Tensor]:
    if not allow:
        raise VeneerError(f"{file} is a pickle file, which can run code when it is opened; convert it to "
                          f"{PEFT_TENSORS}, or, if you trust where it comes from, load(..., allow_pickle=True)")
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise VeneerError(f"{file} holds something other than tensors, or is cut off: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise VeneerError(f"{file} should hold a dict of tensors")
    return data

"""A model's folder of safetensors files, read one tensor at a time, and how another one is laid out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.io.store import MANIFEST, NATIVE_TENSORS, PEFT_CONFIG, PEFT_PICKLE, PEFT_TENSORS
from veneer.io.tensors import Announced, dtype_of
from veneer.method import VeneerError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: files that hold weights, in whatever form, or say where they are: none of them is copied beside merged ones
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data",
            ".index.json", ".ot", ".mlmodel", ".tflite", ".npz")
_ADAPTERS = (PEFT_CONFIG, PEFT_TENSORS, PEFT_PICKLE, NATIVE_TENSORS, MANIFEST)
_INSTEAD = "load the model, veneer.load, veneer.merge(model, keep=False), and save it"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Checkpoint:
    """`files`: the names of each file's tensors; `tensors`: dtype and shape of each. Nothing else is read before `read`
    asks for it, and one file at a time is open. instead: what to do where the files are of another kind."""

    def __init__(self, folder: Path, owner: str, instead: str = _INSTEAD) -> None:
        self.folder, self.owner = folder, owner
        self.index: dict[str, Any] = {}
        self.files: dict[str, list[str]] = {}
        self.tensors: dict[str, Announced] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._at: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        for file, wanted in _files(folder, owner, instead).items():
            self._read_header(file, wanted)
        index = folder / INDEX
        self.index = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}

    def _read_header(self, file: str, wanted: list[str] | None) -> None:
        reader = self._reader(file)
        self.metadata[file] = dict(reader.metadata() or {})
        self.files[file] = list(reader.keys()) if wanted is None else wanted
        missing = set(self.files[file]) - set(reader.keys())
        if missing:
            raise VeneerError(f"{self.owner}: {self.folder / INDEX} says that {min(missing)!r} is in {file}, and it is "
                              "not: the folder is not whole")
        for key in self.files[file]:
            if key in self._at:
                raise VeneerError(f"{self.owner}: {key!r} is in {self._at[key]} and in {file} of {self.folder}, and no "
                                  f"{INDEX} says which counts")
            part = reader.get_slice(key)
            dtype = dtype_of(part.get_dtype())
            if dtype is None:
                raise VeneerError(f"{self.owner}: {key!r} in {self.folder / file} is of type {part.get_dtype()}, which "
                                  "this version of PyTorch does not have")
            self.tensors[key], self._at[key] = Announced(dtype, tuple(part.get_shape())), file

    def _reader(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # before another is mapped
            path = self.folder / file
            try:
                self._open = file, safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
                raise VeneerError(f"{self.owner}: {path}{size} is no complete safetensors file ({error})") from error
        return self._open[1]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._reader(self._at[key]).get_tensor(key)

    def close(self) -> None:
        self._open = None


def _files(folder: Path, owner: str, instead: str) -> dict[str, list[str] | None]:
    """The files of a model, and which tensors of each count; None = all."""
    if not folder.is_dir():
        raise VeneerError(f"{owner}: there is no folder {str(folder)!r}. Local folders are read, and nothing is "
                          "downloaded")
    index = folder / INDEX
    if index.is_file():
        found: dict[str, list[str] | None] = {}
        for key, file in _weight_map(index, owner).items():
            found.setdefault(file, []).append(key)  # type: ignore[union-attr]
        for file in found:
            if not (folder / file).is_file():
                raise VeneerError(f"{owner}: {file}, which {index} names, is not there: the folder is not whole")
        return dict(sorted(found.items()))  # one layer after the other, as they were written
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    names = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in _ADAPTERS)
    if not names:
        inside = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))[:8]
        raise VeneerError(f"{owner}: no safetensors file of a model in {folder}; it has: "
                          f"{', '.join(inside) or 'nothing'}. Files of other kinds cannot be read one tensor at a "
                          f"time: {instead}")
    return dict.fromkeys(names)


def _weight_map(index: Path, owner: str) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(found, dict) and all(isinstance(file, str) and "/" not in file for file in found.values()):
            return found
        reason = "its weight_map does not lead from tensors to files beside it"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise VeneerError(f"{owner}: {index} is no index of a checkpoint ({reason})")


def shards(checkpoint: Checkpoint, sizes: Mapping[str, int], limit: int | None) -> dict[str, list[str]]:
    """The files to write and the tensors of each: those of the checkpoint, or, with a limit in bytes, as many as it
    takes, in the same order."""
    if limit is None:
        return checkpoint.files
    groups: list[list[str]] = [[]]
    filled = 0
    for key in (key for keys in checkpoint.files.values() for key in keys):
        if groups[-1] and filled + sizes[key] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += sizes[key]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups)}


def index_of(checkpoint: Checkpoint, files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The index beside such files, or None for a single one that needs none."""
    if list(files) == [SINGLE] and not checkpoint.index:
        return None
    metadata = {**checkpoint.index.get("metadata", {}), "total_size": sum(sizes.values())}
    where = {key: file for file, keys in files.items() for key in keys}
    return {"metadata": metadata, "weight_map": {key: where[key] for key in sorted(where)}}


def companions(folder: Path) -> list[Path]:
    """What belongs to the model beside its weights (config, tokenizer, licence, code), relative to the folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS) and path.name not in _ADAPTERS:
            found.append(name)
    return found


def config_in(text: str, dtype: torch.dtype) -> str:
    """A config.json with another dtype, at every place where it has one."""
    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: name if key in ("dtype", "torch_dtype") and isinstance(each, str) else changed(each)
                    for key, each in value.items()}
        return value

    name = str(dtype).removeprefix("torch.")
    return json.dumps(changed(json.loads(text)), indent=2, ensure_ascii=False) + "\n"


def parse_size(value: int | str | None, owner: str) -> int | None:
    """Bytes: a number, or one with a unit such as "5GB" or "500MiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(value).upper()) if value is not None else None
    if value is None:
        return None
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if isinstance(value, bool) or size < 1:
        raise VeneerError(f"{owner}: a size is a number of bytes, or one with a unit such as '5GB' or '500MiB', "
                          f"got {value!r}")
    return size

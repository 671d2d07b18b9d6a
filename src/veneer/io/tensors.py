"""safetensors files: a writer that needs nothing but torch, a reader whose errors say what is wrong.

Format: 8 bytes with the header's length (little endian), a JSON header {name: {dtype, shape, data_offsets}}
padded with spaces, then the bytes (https://github.com/huggingface/safetensors#format). The library's own
writer needs numpy, which the core does not depend on, and writes no file that could be synced to disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.method import VeneerError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}
_CHUNK = 1 << 24


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file into an open binary file, one tensor in memory at a time.

    tensors: any device, float or integer. metadata: string → string, kept in the header.
    """
    write_made({name: Announced(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__, file,
               metadata)


class Announced(NamedTuple):
    """A tensor of which only dtype and shape are known yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_made(tensors: Mapping[str, Announced], make: Callable[[str], Tensor], file: IO[bytes],
               metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of tensors that `make` gives by name, each when its turn comes, of the dtype and shape
    announced; none is kept."""
    # Widest elements first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        if dtype not in _DTYPES:
            raise VeneerError(f"{name!r} is of {dtype}, which a safetensors file cannot hold")
        size = tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        tensor = make(name)
        assert Announced(tensor.dtype, tuple(tensor.shape)) == tensors[name], name
        for part in _bytes_of(tensor):
            file.write(part)
        del tensor  # before the next one is made


def dtype_of(code: str) -> torch.dtype | None:
    """The dtype that a safetensors header calls so, or None for one that PyTorch does not have."""
    return next((dtype for dtype, name in _DTYPES.items() if name == code), None)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises `VeneerError` for a file that is cut off or is something else, with how many bytes are there and,
    where the header can still be read, how many there should be.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from error


def read_sizes(path: Path) -> dict[str, Announced]:
    """Dtype and shape of every tensor, from the header of a safetensors file. Raises `VeneerError` as `read_tensors`
    does, and for a dtype that PyTorch does not have."""
    found = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                part = file.get_slice(name)
                dtype = dtype_of(part.get_dtype())
                if dtype is None:
                    raise VeneerError(f"{name!r} in {path} is of type {part.get_dtype()}, which this version of "
                                      "PyTorch does not have")
                found[name] = Announced(dtype, tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from error
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, from the header; empty for a file that is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in _bytes_of(tensor):
            digest.update(part)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, a chunk at a time, without a copy where it is on the CPU already."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    if size:
        view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, size, _CHUNK):
            yield view[start:start + _CHUNK]


def _incomplete(path: Path, error: Exception) -> VeneerError:
    if not path.is_file():
        return VeneerError(f"{path} cannot be read: {error}")
    return VeneerError(f"{path}: not a complete safetensors file ({error}). It has {path.stat().st_size:,} bytes"
                       f"{_expected_size(path)}. Nothing was loaded; copy or save it again")


def _expected_size(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > path.stat().st_size:
            return ""
        try:
            header = json.loads(file.read(length))
            ends = [int(item["data_offsets"][1]) for name, item in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""
    total = 8 + length + max(ends, default=0)
    return f", its header announces {total:,}" if total != path.stat().st_size else ""

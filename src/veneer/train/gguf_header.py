"""Scalars from the header of a GGUF file, without parsing the vocabulary that follows them.

Layout after the GGUF specification of ggml (docs/gguf.md): magic, version, two counts, then key-value pairs of a
length-prefixed key, a type number and the value, all little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from veneer.method import VeneerError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_scalars(path: Path) -> dict[str, Any]:
    """The keys with number, bool or text values that stand before the first array. Raises `VeneerError`."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise VeneerError(f"{path.name} is not a GGUF file")
            _unpack(file, "I")  # version
            _unpack(file, "Q")  # number of tensors
            values: dict[str, Any] = {}
            for _ in range(_unpack(file, "Q")):
                key, kind = _text(file), _unpack(file, "I")
                if kind == _ARRAY and key.startswith("tokenizer."):
                    break  # the vocabulary: long, and nothing that is asked for comes after it
                values[key] = _value(file, kind)
            return values
    except struct.error:
        raise VeneerError(f"{path.name} ends inside its header: the file is truncated") from None


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner = _unpack(file, "I")
        return [_value(file, inner) for _ in range(_unpack(file, "Q"))]
    return _unpack(file, _SCALARS[kind])


def _text(file: BinaryIO) -> str:
    return file.read(_unpack(file, "Q")).decode("utf-8", errors="replace")


def _unpack(file: BinaryIO, code: str) -> Any:
    (value,) = struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))
    return value

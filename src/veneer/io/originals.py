"""The weights a model had, read by name one at a time: from a checkpoint's safetensors files, or from a mapping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.io.store import NATIVE_TENSORS, PEFT_TENSORS
from veneer.method import VeneerError, nearest

Source = str | Path | Mapping[str, Tensor]


class Originals:
    """`shapes`: of every tensor, by name; nothing else is read before `get` asks for it."""

    def __init__(self, title: str, shapes: Mapping[str, tuple[int, ...]], readers: Mapping[str, Any]) -> None:
        self.title, self.shapes, self._readers = title, shapes, readers

    def get(self, name: str) -> Tensor:
        """One tensor, on the device where it lies: the CPU for a file."""
        try:
            return self._readers[name].get_tensor(name)
        except SafetensorError as error:
            raise VeneerError(f"{self.title}: {name!r} cannot be read ({error})") from error

    def find(self, names: Sequence[str]) -> str:
        """The tensor that is known in a model by one of `names`. A checkpoint may have been written from a part of
        that model, or from one around it: its names are then longer or shorter in front.

        Raises `VeneerError` where there is none, naming the nearest, or where there are several.
        """
        for name in names:
            if name in self.shapes:
                return name
        found = sorted({key for key in self.shapes for name in names
                        if key.endswith(f".{name}") or name.endswith(f".{key}")})
        if len(found) == 1:
            return found[0]
        if found:
            raise VeneerError(f"{self.title}: {names[0]!r} may be any of {', '.join(map(repr, found[:4]))}; give a "
                              "mapping from the model's own names to tensors")
        raise VeneerError(f"{self.title} has no tensor {names[0]!r}{nearest(names[0], self.shapes) or '.'} It has "
                          f"{len(self.shapes)} tensors; are they of another model?")


class _Given:
    """The reader of a mapping."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


@contextlib.contextmanager
def open_originals(source: Source, owner: str) -> Iterator[Originals]:
    """Open `source` for reading: a checkpoint's folder, one .safetensors file, or a mapping from names to tensors.

    Never touches the network. Raises `VeneerError`, beginning with `owner`, where there is nothing of the kind.
    """
    if isinstance(source, Mapping):
        yield Originals(f"{owner}: the mapping given", {name: tuple(t.shape) for name, t in source.items()},
                        dict.fromkeys(source, _Given(source)))
        return
    if not isinstance(source, (str, Path)):
        raise VeneerError(f"{owner}: the originals must be a folder, a .safetensors file or a mapping from names to "
                          f"tensors, got {type(source).__name__}")
    path, shapes, readers = Path(source), {}, {}
    with contextlib.ExitStack() as stack:
        for file in _files(path, owner):
            try:
                reader = stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise VeneerError(f"{owner}: {file} is no complete safetensors file ({error})") from error
            for name in reader.keys():  # noqa: SIM118
                shapes[name], readers[name] = tuple(reader.get_slice(name).get_shape()), reader
        yield Originals(f"{owner}: {path}", shapes, readers)


def _files(path: Path, owner: str) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if path.is_file():
        raise VeneerError(f"{owner}: {path} is no .safetensors file, and only those can be read one tensor at a time")
    if not path.is_dir():
        raise VeneerError(f"{owner}: there is nothing at {path}. Local paths are read, and nothing is downloaded")
    found = sorted(file for file in path.glob("*.safetensors") if file.name not in (NATIVE_TENSORS, PEFT_TENSORS))
    if not found:
        inside = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))[:8]
        raise VeneerError(f"{owner}: no .safetensors file of a model in {path}; it has: "
                          f"{', '.join(inside) or 'nothing'}")
    return found

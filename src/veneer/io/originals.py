"""The weights a model had, read by name one at a time: from a checkpoint's safetensors files, or from a mapping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.io.checkpoint import Checkpoint
from veneer.method import VeneerError, nearest

Source = str | Path | Mapping[str, Tensor]
_INSTEAD = "load the model, and give a mapping from names to tensors"


class Originals:
    """`shapes`: of every tensor, by name; nothing else is read before `get` asks for it."""

    def __init__(self, title: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.title, self.shapes, self._read = title, shapes, read

    def get(self, name: str) -> Tensor:
        """One tensor, on the device where it lies: the CPU for a file."""
        try:
            return self._read(name)
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


@contextlib.contextmanager
def open_originals(source: Source, owner: str) -> Iterator[Originals]:
    """Open `source` for reading: a checkpoint's folder, one .safetensors file, or a mapping from names to tensors.

    Never touches the network. Raises `VeneerError`, beginning with `owner`, where there is nothing of the kind.
    """
    if isinstance(source, Mapping):
        yield Originals(f"{owner}: the mapping given", {name: tuple(t.shape) for name, t in source.items()},
                        source.__getitem__)
        return
    if not isinstance(source, (str, Path)):
        raise VeneerError(f"{owner}: the originals must be a folder, a .safetensors file or a mapping from names to "
                          f"tensors, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        checkpoint = Checkpoint(path, owner, _INSTEAD)
        try:
            yield Originals(f"{owner}: {path}", {name: t.shape for name, t in checkpoint.tensors.items()},
                            checkpoint.read)
        finally:
            checkpoint.close()
        return
    _check_file(path, owner)
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise VeneerError(f"{owner}: {path} is no complete safetensors file ({error})") from error
        shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        yield Originals(f"{owner}: {path}", shapes, reader.get_tensor)


def _check_file(path: Path, owner: str) -> None:
    if not path.exists():
        raise VeneerError(f"{owner}: there is nothing at {path}. Local paths are read, and nothing is downloaded")
    if path.suffix != ".safetensors":
        raise VeneerError(f"{owner}: {path} is no .safetensors file, and only those can be read one tensor at a time")

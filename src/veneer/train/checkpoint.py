"""What a checkpoint holds beside the adapter and transformers' own files: how far training has come in what adapters
share, such as the averages by which ranks are cut; and numbers that the adapter's file has rounded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from veneer.attached import attached, shared_states
from veneer.io.files import write_all
from veneer.io.tensors import read_tensors, write_tensors
from veneer.method import Adapter, Shared, VeneerError

PROGRESS = "progress.safetensors"


def save_progress(model: nn.Module, name: str, folder: Path) -> None:
    """Write the progress of the adapter `name`, and of what it shares, into `folder`, or, where there is none, take
    away a file that an earlier checkpoint has left there."""
    tensors = dict(_progress(model, name))
    if tensors:
        write_all(folder, [(PROGRESS, functools.partial(write_tensors, tensors=tensors, metadata={}))])
    else:
        (folder / PROGRESS).unlink(missing_ok=True)


def load_progress(model: nn.Module, name: str, folder: Path) -> None:
    """Take up what `save_progress` wrote. Raises `VeneerError` for a file that does not fit, and where there is none
    but the adapter needs it."""
    file = folder / PROGRESS
    if not file.is_file():
        if any(_progress(model, name)):
            raise VeneerError(f"the checkpoint {str(folder)!r} has no {PROGRESS}, without which training cannot go on")
        return
    tensors, _ = read_tensors(file)
    for place, holder in _holders(model, name):
        mine = {key.removeprefix(place): tensor for key, tensor in tensors.items() if key.startswith(place)}
        if mine:
            holder.resume(mine)


def _progress(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    for place, holder in _holders(model, name):
        for key, tensor in holder.progress().items():
            yield f"{place}{key}", tensor


def _holders(model: nn.Module, name: str) -> Iterator[tuple[str, Adapter | Shared]]:
    """What may have progress of its own, by the beginning of its keys."""
    for i, state in enumerate(shared_states(model, name)):
        yield f"{i}/", state
    for weight, adapter in attached(model, name):
        yield f"weights/{weight.name}/", adapter

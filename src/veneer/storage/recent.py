"""Dense copies of packed weights that were read a moment ago, within a number of bytes that the user gives.

A backward wants the weight that its forward has read. Keeping it would cost as much memory as a dense model; with
gradient checkpointing, though, the backward of a block comes right after its forward has run again, so that a small
store of the most recent reads serves it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.stamp import Stamp

Key = tuple[int, torch.dtype]


class Recent:
    """The most recent reads, at most `limit` bytes of them; a limit of 0 keeps nothing."""

    def __init__(self) -> None:
        self.limit = 0
        self.size = 0
        self._held: OrderedDict[Key, tuple[weakref.ref, list[Stamp], Tensor]] = OrderedDict()

    def read(self, module: nn.Module, dtype: torch.dtype, read: Callable[[torch.dtype], Tensor]) -> Tensor:
        """The module's weight in `dtype`, from the store or by `read`."""
        if not self.limit or torch.compiler.is_compiling():
            return read(dtype)
        key, stamps = (id(module), dtype), _stamps(module)
        held = self._held.get(key)
        if held is not None and held[0]() is module and held[1] == stamps:
            self._held.move_to_end(key)
            return held[2]
        value = read(dtype)
        self._drop(key)
        if value.nbytes <= self.limit:
            self._held[key] = (weakref.ref(module, lambda _: self._drop(key)), stamps, value)
            self.size += value.nbytes
            self._shrink()
        return value

    def forget(self, module: nn.Module) -> None:
        """Its weight has changed."""
        for key in [key for key in self._held if key[0] == id(module)]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.size -= held[2].nbytes

    def _shrink(self) -> None:
        while self.size > self.limit:
            self._drop(next(iter(self._held)))


def _stamps(module: nn.Module) -> list[Stamp]:
    """Of the frozen tensors that the layer holds: codes, scales, whatever they are called."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [Stamp(tensor) for tensor in tensors if tensor is not None and not tensor.requires_grad]


RECENT = Recent()


def keep_dense(megabytes: float) -> None:
    """Keep the most recently read packed weights as dense numbers, up to so many MiB; 0 (the default) keeps none.

    Worth its memory with gradient checkpointing: set it to the dense size of one checkpointed block. Raises
    `VeneerError` for a negative number.
    """
    if not isinstance(megabytes, (int, float)) or isinstance(megabytes, bool) or not megabytes >= 0:
        raise VeneerError(f"keep_dense: a number of MiB of at least 0, got {megabytes!r}")
    RECENT.limit = int(megabytes * 2**20)
    RECENT._shrink()

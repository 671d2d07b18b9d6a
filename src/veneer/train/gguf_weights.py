"""A model that was loaded from a GGUF file holding its linear weights as the file's blocks again.

Which of the file's tensors a weight is follows from its name; in what order its rows stand there (llama.cpp turns those
of queries and keys about, for instance) is found by comparing rows. So nothing here knows an architecture, and a weight
is only held so where its blocks, read, give the loaded numbers bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.quantize import QuantizeReport
from veneer.storage import packed_storage
from veneer.storage.gguf_blocks import gguf_linear
from veneer.storage.gguf_codec import decode
from veneer.train import gguf_header
from veneer.train.extras import require
from veneer.weights import Weight, scan

_DENSE = ("F32", "F16", "BF16", "F64")


@torch.no_grad()
def hold_blocks(model: nn.Module, path: Path) -> QuantizeReport:
    """Hold every linear weight but the output head as its blocks in the file, in place.

    model: loaded, dequantised, from that very file. What is stored as ordinary numbers, or otherwise than the model has
    it, is left and named in the report. Raises `VeneerError` where nothing can be held so.
    """
    gguf = require("gguf", "reading a GGUF file")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    names = _names(gguf, path)
    done, skipped, before, after = 0, [], 0, 0
    for weight in scan(model):
        if not weight.is_linear or weight.is_head:
            continue
        module = weight.places[0].module
        size = sum(tensor.nbytes for tensor in module.parameters())
        reason = _refusal(weight) or _hold(module, tensors.get(names(weight.name)))
        if reason is not None:
            skipped.append(f"{weight.name!r}: {reason}")
            continue
        storage = packed_storage(module)
        assert storage is not None
        done, before, after = done + 1, before + size, after + storage.nbytes(module)
    if not done:
        raise VeneerError(f"{path.name}: no linear weight can be held as the file has it. {'; '.join(skipped[:3])}")
    return QuantizeReport("blocks of the file", done, before, after, tuple(skipped))


def _names(gguf: Any, path: Path) -> Callable[[str], str]:
    """From a weight's name in the model to its tensor's in the file."""
    header = gguf_header.read_scalars(path)
    kind = header.get("general.architecture")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if kind not in known:
        raise VeneerError(f"{path.name}: the gguf package does not know the names in a model of kind {kind!r}")
    table = gguf.get_tensor_name_map(known[kind], int(header.get(f"{kind}.block_count", 0)))
    return lambda name: f"{table.get_name(name)}.weight"


def _refusal(weight: Weight) -> str | None:
    place = weight.places[0]
    if len(weight.places) > 1:
        return f"it is tied ({', '.join(repr(p.names[0]) for p in weight.places)})"
    return None if type(place.module) is nn.Linear else f"only an nn.Linear is packed, and it is of a " \
                                                        f"{type(place.module).__name__}"


def _hold(module: Any, tensor: Any) -> str | None:
    """Give the layer its blocks; or why not."""
    if tensor is None:
        return "the file has no tensor of its name"
    kind = tensor.tensor_type
    if kind.name in _DENSE:
        return f"the file holds it as {kind.name}"
    blocks, loaded = torch.from_numpy(tensor.data.copy()), module.weight.data
    order = row_order(decode(blocks, int(kind), loaded.dtype), loaded)
    if order is None:
        return "the model holds other numbers than the file"
    gguf_linear(module, blocks[order], int(kind))
    return None


def row_order(stored: Tensor, loaded: Tensor) -> Tensor | None:
    """Indices (rows,) by which the rows of `stored` are those of `loaded` bit for bit, or None."""
    if stored.shape != loaded.shape:
        return None
    if torch.equal(stored, loaded):
        return torch.arange(len(stored))
    there, wanted = ([row.tobytes() for row in matrix.contiguous().view(torch.uint8).numpy()]
                     for matrix in (stored, loaded))
    places = {row: i for i, row in enumerate(there)}
    order = [places.get(row, -1) for row in wanted]
    return None if -1 in order else torch.tensor(order)

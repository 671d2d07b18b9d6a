"""Base weights that PEFT has put into an adapter file: of targeted embeddings, and after a resized vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.io.fingerprint import same_values
from veneer.io.records import Record
from veneer.methods import Rows
from veneer.sharding import whole
from veneer.weights import Weight


def reconcile(carried: Mapping[str, Tensor], weights: list[Weight], taken: set[str],
              values: Callable[[Weight], Tensor | None]) -> tuple[list[Record], list[str], list[str]]:
    """Carried weights (by parameter path) against this base → (records, problems, notes).

    Equal ones need nothing. Where most rows are equal and some are not, those are the rows of a resized
    vocabulary, random on each side: they become `Rows`, unless the weight is in `taken`, adapted already.
    Anything else is another base. values: this base's own numbers, or None where they are gone.
    """
    here = {place.names[-1]: weight for weight in weights for place in weight.places}
    records: dict[str, Record] = {}
    problems, notes = [], []
    for path, tensor in carried.items():
        weight = here[path]
        base = values(weight)
        if base is None:
            continue
        own = whole(base.detach()).cpu()
        fits = own.shape == tensor.shape
        if fits and same_values(tensor, own):
            continue
        rows = _other_rows(tensor, own) if fits and tensor.dim() == 2 else []
        if 0 < len(rows) <= len(own) // 2 and weight.name not in taken:
            records[weight.name] = Record(weight.name, Rows(rows), {"rows": tensor[rows]}, {"rows": path})
            notes.append(f"the file carries {path!r} with {len(rows)} rows of its own (a resized vocabulary); they "
                         "were loaded as Rows")
        else:
            problems.append(f"another base model: the file carries base weight {path!r} {tuple(tensor.shape)}, and "
                            f"this model's {tuple(own.shape)} is not the same; load or resize the base first")
    return list(records.values()), problems, notes


def _other_rows(tensor: Tensor, own: Tensor) -> list[int]:
    narrow = min(tensor.dtype, own.dtype, key=lambda d: torch.finfo(d).bits)
    return (tensor.to(narrow) != own.to(narrow)).any(1).nonzero().flatten().tolist()

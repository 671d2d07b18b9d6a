"""By what an adapter knows its base model again: names, shapes, and a sample of the values of every weight.

The samples are kept as they are, in the dtype the base had, so that a base loaded in another dtype is still
recognised: both sides are rounded to the narrower dtype and must then be equal (between bfloat16 and float16,
where neither holds the other, they must agree to bfloat16's precision). What an adapter replaces as a whole
(`Full`, the rows of `Rows`) is left out: it does not matter what the base has there.

Values are those of the base itself: of merged weights the kept originals. A difference that touches none of
the sampled elements goes unseen; a fine-tuned base differs nearly everywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.method import Method, parse_dtype
from veneer.methods import Full, Rows
from veneer.sharding import is_sharded
from veneer.weights import Weight, moved, original

#: samples per model in all, and the least and most per weight
_TOTAL, _LEAST, _MOST = 4096, 8, 256
#: cosine between samples of one weight held in two ways: 4 bits give 0.99, 2 bits 0.9, another model about 0
_ALIKE = 0.7


@dataclass(frozen=True)
class Sample:
    """One weight's shape and dtype and some of its values; no values where it is replaced or unreadable."""

    shape: tuple[int, ...]
    dtype: str
    values: Tensor | None

    @property
    def packed(self) -> str:
        """The storage of a packed weight; empty for ordinary numbers. `dtype` is "nf4 as bfloat16" for a packed one."""
        return self.dtype.rpartition(" as ")[0]


@dataclass
class Fingerprint:
    """Samples by weight name. `rows` are trained rows, from which nothing is sampled."""

    count: int
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 (hex) of everything: equal for equal bases in equal dtypes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        weights = {name: [list(s.shape), s.dtype, _encode(s.values)] for name, s in self.samples.items()}
        return {"count": self.count, "rows": {k: list(v) for k, v in self.rows.items()}, "weights": weights}

    def unknown(self, methods: Mapping[str, Method]) -> int:
        """How many weights that matter could not be sampled: merged for good, on meta, or sharded."""
        return sum(sample.values is None and not isinstance(methods.get(name), Full)
                   for name, sample in self.samples.items())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        found = cls(int(data["count"]), {k: tuple(v) for k, v in data["rows"].items()})
        for name, (shape, dtype, text) in data["weights"].items():
            found.samples[name] = Sample(tuple(shape), dtype, _decode(text, dtype.rpartition(" as ")[2]))
        return found


def fingerprint(weights: list[Weight], methods: Mapping[str, Method]) -> Fingerprint:
    """The fingerprint of a base, given its scanned weights and what is on them (weight name → method)."""
    count = max(_LEAST, min(_MOST, _TOTAL // max(len(weights), 1)))
    rows = {name: m.ids for name, m in methods.items() if isinstance(m, Rows)}
    made = Fingerprint(count, rows)
    for weight in weights:
        skip = isinstance(methods.get(weight.name), Full)
        made.samples[weight.name] = _sample(weight, count, rows.get(weight.name, ()), skip)
    return made


def compare(saved: Fingerprint, weights: list[Weight], made: str = "this adapter was trained on") -> list[str]:
    """What is different about another base, one sentence each; empty when it is the same. made: for the message, what
    the saved one is to what it was saved with."""
    here = {weight.name: weight for weight in weights}
    out = []
    for name, then in saved.samples.items():
        if name not in here:
            out.append(f"base weight {name!r} {then.shape} is not in this model")
            continue
        now = _sample(here[name], saved.count, saved.rows.get(name, ()), then.values is None)
        if now.shape != then.shape:
            out.append(f"base weight {name!r} is {now.shape} here and was {then.shape}")
        elif not _same(then, now):
            out.append(f"base weight {name!r} has other values than the one {made}")
    return out


@torch.no_grad()
def _sample(weight: Weight, count: int, but_rows: tuple[int, ...], skip: bool) -> Sample:
    shape, dtype = weight.layout.native, str(weight.dtype).removeprefix("torch.")
    dtype = dtype if weight.storage is None else f"{weight.storage.name} as {dtype}"
    tensor = None if skip or moved(weight) else original(weight)
    if tensor is None or tensor.is_meta or not tensor.numel() or is_sharded(tensor):
        return Sample(shape, dtype, None)
    at = [i for i in _positions(tensor.numel(), count) if not but_rows or i // tensor[0].numel() not in but_rows]
    index = torch.tensor(at, dtype=torch.int64, device=tensor.device)
    # By coordinates: flattening a transposed weight would copy it.
    values = tensor[torch.unravel_index(index, tensor.shape)] if at else tensor.new_empty(0)
    return Sample(shape, dtype, values.detach().cpu())


def _positions(size: int, count: int) -> list[int]:
    # Multiples of the golden ratio fall evenly over the range and not into few columns, as a stride may.
    return sorted({(i * 0x9E3779B1 % 2**32) * size >> 32 for i in range(min(count, size))})


def _same(then: Sample, now: Sample) -> bool:
    """Whether two samples may be of one base: of a packed weight beside a dense one, or one packed in another way, no
    more can be asked than that the numbers lie close together."""
    if then.values is None or now.values is None:
        return True
    if then.packed == now.packed:
        return same_values(then.values, now.values)
    a, b = then.values.double(), now.values.double()
    return bool(a @ b >= _ALIKE * a.norm() * b.norm())


def same_values(then: Tensor | None, now: Tensor | None) -> bool:
    """Equal bits, or equal after rounding to the narrower of two dtypes."""
    if then is None or now is None:
        return True
    if then.dtype == now.dtype:
        return torch.equal(then.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8))
    if not (then.is_floating_point() and now.is_floating_point()):
        return True  # packed in another way: nothing that could be compared
    if {then.dtype, now.dtype} == {torch.bfloat16, torch.float16}:
        return torch.allclose(then.float(), now.float(), rtol=2**-7, atol=1e-7)
    narrow = min(then.dtype, now.dtype, key=lambda d: torch.finfo(d).bits)
    return torch.equal(then.to(narrow), now.to(narrow))


def _encode(values: Tensor | None) -> str | None:
    if values is None:
        return None
    return base64.b64encode(bytes(values.contiguous().view(torch.uint8).tolist())).decode()


def _decode(text: str | None, dtype: str) -> Tensor | None:
    if text is None:
        return None
    raw = torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
    return raw.view(parse_dtype(dtype)) if raw.numel() else torch.empty(0, dtype=parse_dtype(dtype))

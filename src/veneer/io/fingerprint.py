"""By what an adapter knows its base model again: names, shapes, and a sample of the values of every weight.

The samples are kept as they are, in the dtype the base had, so that a base loaded in another dtype is still
recognised: both sides are rounded to the narrower dtype and must then be equal (between bfloat16 and float16,
where neither holds the other, they must agree to bfloat16's precision). What an adapter replaces as a whole
(`Full`, the rows of `Rows`) is left out: it does not matter what the base has there.

Values are those of the base itself: of merged weights the kept originals, of weights that a start has rewritten those
from before, of which a sample was kept. A difference that touches none of
the sampled elements goes unseen; a fine-tuned base differs nearly everywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.hosts import Host
from veneer.method import Method, parse_dtype
from veneer.methods import Full, Rows
from veneer.sharding import is_sharded
from veneer.weights import Weight, moved, original

#: samples per model in all, and the least and most per weight
_TOTAL, _LEAST, _MOST = 4096, 8, 256
#: cosine between samples of one weight held in two ways: 4 bits give 0.99, 2 bits 0.9, another model about 0
_ALIKE = 0.7
#: the same of all weights together that are packed in one way, and of each by itself. Of normal numbers: NF4 from bf16
#: and from fp16 0.9997, with and without quantised scales 0.99999; of a model and one 2% away from it 0.9975
_NEARLY, _EACH = 0.999, 0.85
#: what every normal float was called in adapters that were saved before each had its own name
_ANY_NORMAL_FLOAT = "nf2, nf4, nf8"


@dataclass(frozen=True)
class Sample:
    """One weight's shape and dtype and some of its values; no values where it is replaced or unreadable."""

    shape: tuple[int, ...]
    dtype: str
    values: Tensor | None

    @property
    def packed(self) -> str:
        """How a packed weight is held; empty for ordinary numbers. `dtype` is "nf4 as bfloat16" for a packed one."""
        return self.dtype.rpartition(" as ")[0]

    def held_like(self, now: Sample) -> bool:
        """Whether this saved sample's weight was held as another one's is now."""
        if self.packed == _ANY_NORMAL_FLOAT:
            return now.packed in _ANY_NORMAL_FLOAT.split(", ")
        return self.packed == now.packed

    def held(self) -> str:
        """For a reader: "nf4 (read as bfloat16)", or "bfloat16"."""
        packed, _, dtype = self.dtype.rpartition(" as ")
        return f"{packed.replace(', nf8', ' or nf8')} (read as {dtype})" if packed else dtype


@dataclass
class Fingerprint:
    """Samples by weight name. `rows` are trained rows, from which nothing is sampled. `rewritten`: what starts have
    made of weights, which are in `samples` as they were before; the digest is without them."""

    count: int
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    rewritten: dict[str, Sample] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 (hex) of the base: equal for equal bases in equal dtypes."""
        base = {key: value for key, value in self.to_dict().items() if key != "rewritten"}
        return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        made = {"count": self.count, "rows": {k: list(v) for k, v in self.rows.items()},
                "weights": _to_plain(self.samples)}
        return made | {"rewritten": _to_plain(self.rewritten)} if self.rewritten else made

    def unknown(self, methods: Mapping[str, Method]) -> int:
        """How many weights that matter could not be sampled: merged for good, on meta, or sharded."""
        return sum(sample.values is None and not isinstance(methods.get(name), Full)
                   for name, sample in self.samples.items())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        found = cls(int(data["count"]), {k: tuple(v) for k, v in data["rows"].items()})
        found.samples, found.rewritten = _from_plain(data["weights"]), _from_plain(data.get("rewritten", {}))
        return found


def _to_plain(samples: Mapping[str, Sample]) -> dict[str, list]:
    return {name: [list(s.shape), s.dtype, _encode(s.values)] for name, s in samples.items()}


def _from_plain(data: Mapping[str, Any]) -> dict[str, Sample]:
    return {name: Sample(tuple(shape), dtype, _decode(text, dtype.rpartition(" as ")[2]))
            for name, (shape, dtype, text) in data.items()}


def fingerprint(weights: list[Weight], methods: Mapping[str, Method]) -> Fingerprint:
    """The fingerprint of a base, given its scanned weights and what is on them (weight name → method)."""
    count = max(_LEAST, min(_MOST, _TOTAL // max(len(weights), 1)))
    rows = {name: m.ids for name, m in methods.items() if isinstance(m, Rows)}
    made = Fingerprint(count, rows)
    for weight in weights:
        skip = isinstance(methods.get(weight.name), Full)
        made.samples[weight.name] = _sample(weight, count, rows.get(weight.name, ()), skip)
        if moved(weight):
            made.rewritten[weight.name] = _present(weight, count, (), skip)
    return made


def begun_elsewhere(saved: Fingerprint, weights: list[Weight]) -> list[str]:
    """Which of these weights, on which a start is to be run again, are held in another form than the one it was run on
    then, so that it would give something else; unless they are what that start made of them."""
    out = []
    for weight in weights:
        then = saved.samples.get(weight.name)
        if then is None or then.values is None:
            continue
        now = _sample(weight, saved.count, saved.rows.get(weight.name, ()), False)
        made, here = saved.rewritten.get(weight.name), _sample(weight, saved.count, (), False)
        is_made = made is not None and made.values is not None and same_values(made.values, here.values)
        if (now.packed or not then.held_like(now)) and not is_made and not same_values(then.values, now.values):
            out.append(f"{weight.name!r} is held as {now.held()} here and was held as {then.held()} when its adapter "
                       "was started from it; the start must be run again, and from other numbers it gives another "
                       "adapter. Load the base model as it was")
    return out


def compare(saved: Fingerprint, weights: list[Weight], made: str = "this adapter was trained on") -> list[str]:
    """What is different about another base, one sentence each; empty when it is the same. made: for the message, what
    the saved one is to what it was saved with."""
    here = {weight.name: weight for weight in weights}
    out: list[str] = []
    alike: dict[str, tuple[Tensor, Tensor]] = {}
    for name, then in saved.samples.items():
        if name not in here:
            out.append(f"base weight {name!r} {then.shape} is not in this model")
            continue
        now = _sample(here[name], saved.count, saved.rows.get(name, ()), then.values is None)
        if now.shape != then.shape:
            out.append(f"base weight {name!r} is {now.shape} here and was {then.shape}")
        elif then.values is None or now.values is None:
            continue
        elif then.held_like(now) and now.packed:
            alike[name] = then.values, now.values
        elif not _same(then, now):
            out.append(f"base weight {name!r} has other values than the one {made}")
    return out + [f"base weight {name!r} has other values than the one {made}" for name in _apart(alike)]


def _apart(alike: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Of weights that are packed in the way that they were: those that differ, where together they are too far from
    what they were to be the same base, or one of them is by itself. Settings, the dtype they were quantised from, and
    some libraries' evaluation change a few codes or scales; a few values of one weight cannot tell that from another
    base."""
    other = {name: pair for name, pair in alike.items() if not same_values(*pair)}
    far = [name for name, pair in other.items() if not _close(*pair, _EACH)]
    if far or not other:
        return far
    then, now = (torch.cat([pair[i].double().flatten() / pair[0].double().norm().clamp_min(1e-30)
                            for pair in alike.values()]) for i in (0, 1))
    return [] if _close(then, now, _NEARLY) else list(other)


def held_otherwise(saved: Fingerprint, weights: list[Weight]) -> str | None:
    """A sentence about these weights, where they are held in more or fewer bits than when an adapter was trained on
    them, or not with the same numbers; None where they are held as they were."""
    other: list[tuple[str, Sample, Sample]] = []
    near: list[str] = []
    for weight in weights:
        then = saved.samples.get(weight.name)
        if then is not None and then.values is not None:
            now = _sample(weight, saved.count, saved.rows.get(weight.name, ()), False)
            if now.values is not None and not then.held_like(now):
                other.append((weight.name, then, now))
            elif now.values is not None and now.packed and not same_values(then.values, now.values):
                near.append(weight.name)
    if near and not other:
        who = f"the base weight {near[0]!r} is" if len(near) == 1 else \
            f"{len(near)} base weights ({near[0]!r} is one) are"
        return (f"{who} held as when this adapter was trained, but not with the same numbers: quantised from another "
                "dtype or with other settings, or rounded by an evaluation since. The model's answers will differ a "
                "little; if they differ much, it is another base model")
    if not other:
        return None
    name, then, now = other[0]
    who, was, is_ = (f"the base weight {name!r}", "was", "is") if len(other) == 1 else \
        (f"{len(other)} base weights ({name!r} is one)", "were", "are")
    return (f"{who} {was} held as {then.held()} when this adapter was trained and {is_} held as {now.held()} here. "
            "The adapter learned to make up for the rounding of that time, so the model's answers will differ a little")


def sample(weight: Weight) -> Sample:
    """Of a weight whose values are about to be rewritten: enough for the fingerprint of any model it is part of."""
    return _sample(weight, _MOST, (), False)


def _sample(weight: Weight, count: int, but_rows: tuple[int, ...], skip: bool) -> Sample:
    """Of the weight as it was before a start rewrote it, where one did."""
    for place in weight.places:
        if isinstance(place.module, Host) and place.param in place.module.veneer.moved:
            return _fewer(place.module.veneer.moved[place.param].sample, count, but_rows, skip)
    return _present(weight, count, but_rows, skip)


def _fewer(wide: Sample, count: int, but_rows: tuple[int, ...], skip: bool) -> Sample:
    """What `_present` would have given, out of a sample of `_MOST` values of every row."""
    if skip or wide.values is None:
        return Sample(wide.shape, wide.dtype, None)
    size = math.prod(wide.shape)
    wanted = set(_chosen(wide.shape, count, but_rows))
    return Sample(wide.shape, wide.dtype, wide.values[[at in wanted for at in _positions(size, _MOST)]])


@torch.no_grad()
def _present(weight: Weight, count: int, but_rows: tuple[int, ...], skip: bool) -> Sample:
    shape, dtype = weight.layout.native, str(weight.dtype).removeprefix("torch.")
    dtype = dtype if weight.storage is None else f"{weight.held_as} as {dtype}"
    packed_apart = weight.storage is not None and is_sharded(weight.tensor)  # codes without their scales: unreadable
    tensor = None if skip or packed_apart else original(weight)
    if tensor is None or tensor.is_meta or not tensor.numel() or is_sharded(tensor):
        return Sample(shape, dtype, None)
    at = _chosen(tuple(tensor.shape), count, but_rows)
    index = torch.tensor(at, dtype=torch.int64, device=tensor.device)
    # By coordinates: flattening a transposed weight would copy it.
    values = tensor[torch.unravel_index(index, tensor.shape)] if at else tensor.new_empty(0)
    return Sample(shape, dtype, values.detach().cpu())


def _chosen(shape: tuple[int, ...], count: int, but_rows: tuple[int, ...]) -> list[int]:
    size, row = math.prod(shape), math.prod(shape[1:])
    return [at for at in _positions(size, count) if not but_rows or at // row not in but_rows]


def _positions(size: int, count: int) -> list[int]:
    # Multiples of the golden ratio fall evenly over the range and not into few columns, as a stride may.
    return sorted({(i * 0x9E3779B1 % 2**32) * size >> 32 for i in range(min(count, size))})


def _same(then: Sample, now: Sample) -> bool:
    """Whether two samples may be of one base: of a packed weight beside a dense one, or one packed in another way, no
    more can be asked than that the numbers lie close together."""
    assert then.values is not None
    assert now.values is not None
    return same_values(then.values, now.values) if then.held_like(now) else _close(then.values, now.values, _ALIKE)


def _close(then: Tensor, now: Tensor, least: float) -> bool:
    """Whether the cosine between the values is at least so much."""
    a, b = then.double(), now.double()
    return bool(a @ b >= least * a.norm() * b.norm())


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

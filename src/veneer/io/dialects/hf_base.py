"""What both directions of PEFT's files work on, and what every `peft_type` must say of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.io.records import BaseMap, Record, Site
from veneer.method import Method
from veneer.methods import DoRA, LoRA

PREFIX = "base_model.model."


def whole_number(number: float) -> float:
    """An int where it is one, as PEFT's configs have it."""
    return int(number) if float(number).is_integer() else float(number)


class Inexpressible(Exception):
    """PEFT's config has no way to say this; the message says what."""


def way_out(method: Method, with_dora: bool) -> str:
    """A clause on how a file can hold what a method does as LoRA; empty where it cannot. with_dora: it holds DoRA."""
    dora = isinstance(method, DoRA)
    inner = method.inner if isinstance(method, DoRA) else method
    if not inner.additive or (isinstance(inner, LoRA) and (with_dora or not dora)):
        return ""
    extract = ", extract=True" if dora and not with_dora else ""
    return f" (veneer.to_lora(model{extract}) makes plain LoRA of it, exact or of a rank that you give)"


class Draft:
    """The files while they are being put together."""

    def __init__(self, records: list[Record], base: BaseMap) -> None:
        self.base = base
        self.records = {record.name: record for record in records}
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        #: module or parameter that PEFT knows the adapter by → the method on it (the inner one of DoRA)
        self.methods: dict[str, Any] = {}
        self.modules: list[str] = []  # target_modules
        self.parameters: list[str] = []  # target_parameters
        self.wrapped: Counter[str] = Counter()  # module → how many wrappers PEFT lays around it
        self.tied = False

    def path(self, name: str) -> str:
        """A module's or parameter's name once PEFT has wrapped what it is in."""
        parts = name.split(".")
        out: list[str] = []
        for i, part in enumerate(parts):
            out.append(part)
            if i < len(parts) - 1:
                out += ["base_layer"] * self.wrapped[".".join(parts[:i + 1])]
        return PREFIX + ".".join(out)

    def known(self, names: Iterable[str]) -> Iterable[str] | None:
        """Names of the base, among which short ones may be chosen; None where there may be others."""
        return names if self.base.known else None

    def kind(self, module: str) -> str:
        """How the module's weight is applied, or nothing where it has none."""
        site = self.base.by_path.get(f"{module}.weight")
        return site.spots[0].kind if site else ""

    def tie(self, site: Site) -> None:
        """PEFT ties what it trains between the input embedding and a linear head, where the model's config says so."""
        first, *others = site.spots
        if (first.kind, [spot.kind for spot in others]) != ("embedding", ["linear"]):
            raise Inexpressible(f"{site.name!r} is tied; PEFT keeps only an embedding and a head after it tied")
        if first.module != self.base.tied_embedding:
            raise Inexpressible(f"{site.name!r} is tied, and the model's config does not say so (tie_word_embeddings): "
                                "PEFT would untie it")
        if f"{others[0].module}.bias" in self.base.by_path:
            raise Inexpressible(f"{others[0].module!r} is tied and has a bias, which PEFT's tied copy of it would lose")
        self.tied = True


@dataclass
class Reading:
    """The records while they are being put together.

    base: tensors of the base found in the file, by path. heads: what the file has for second places of tied
    weights. shared: what all weights share, by the name it has in the adapter that owns it, with its key.
    """

    config: dict[str, Any]
    map: BaseMap
    prefix: str
    tensors: Mapping[str, Tensor]
    records: dict[str, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def record(self, site: Site, method: Method) -> Record:
        return self.records.setdefault(site.name, Record(site.name, method, {}))

    def put(self, site: Site, method: Method, part: str, tensor: Tensor, key: str) -> None:
        record = self.record(site, method)
        record.tensors[part] = tensor
        record.keys[part] = key

    def expect(self, record: Record, stem: str, parts: Mapping[str, str]) -> None:
        """Under what keys the file should have the parts of a record, for the message when it has not."""
        for part, tail in parts.items():
            record.keys.setdefault(part, stem + tail)

    def share(self, part: str, key: str, tensor: Tensor) -> None:
        """Take what all weights share; PEFT may repeat it for every layer."""
        first, known = self.shared.setdefault(part, (key, tensor))
        if known is not tensor and not (known.shape == tensor.shape and torch.equal(known, tensor)):
            self.problems.append(f"unexpected: {key!r} is not the same as {first!r}, and all layers share one")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class FileType:
    """One `peft_type`: what its files have beside what all PEFT's files have. Holds no state.

    passed_over: config keys without influence on what a loaded adapter computes. refused: keys with influence that
    are refused unless null, false or empty → what they do. bias_only: its own word for the biases of the adapted
    layers in the key `bias`. shared: tensor that all weights share, by its whole key → its name in the adapter that
    owns it.
    """

    peft_type: str
    passed_over: frozenset[str] = frozenset()
    refused: Mapping[str, str] = {}
    bias_only: str = ""
    shared: Mapping[str, str] = {}

    @property
    def keys(self) -> Mapping[str, Any]:
        """The config keys it understands, with PEFT's defaults where a key is left out."""
        raise NotImplementedError

    @property
    def repeated(self) -> Collection[str]:
        """Last pieces of keys under which PEFT repeats for every layer what all share."""
        return ()

    def piece(self, part: str, kind: str) -> str:
        """The last piece of the key under which PEFT has a part of an adapter on a weight of this kind."""
        raise NotImplementedError

    # -- writing ----------------------------------------------------------------------------------------
    def place(self, draft: Draft, records: Sequence[Record]) -> None:
        """Put the targets and tensors of the records with its method; raise `Inexpressible` for what PEFT lacks."""
        raise NotImplementedError

    def config(self, draft: Draft) -> dict[str, Any]:
        """Its part of adapter_config.json; raises `Inexpressible` too."""
        raise NotImplementedError

    # -- reading ----------------------------------------------------------------------------------------
    def check(self, config: Mapping[str, Any]) -> None:
        """Raise `VeneerError` for values of understood keys under which a file means something else."""

    def read(self, reading: Reading, key: str, name: str, tensor: Tensor) -> bool:
        """Take a tensor; False when it is none of this type's. name: its key without the file's prefix."""
        raise NotImplementedError

    def finish(self, reading: Reading) -> None:
        """Once all tensors are read: what is missing, and what only the whole can tell."""
        raise NotImplementedError

    # -- without a model --------------------------------------------------------------------------------
    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Counter[str], set[str]]:
        """What its tensors tell: a text about an adapter → number of weights, and the keys that it knows."""
        raise NotImplementedError

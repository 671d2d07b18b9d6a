"""Methods whose files are told by a table: config keys ↔ options, names of tensors ↔ parts of an adapter.

One `Family` is one `peft_type` on whole modules, without what LoRA's files have beside it (single parameters,
attention, ties). The tables are in `hf_tables`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.hosts import Layout
from veneer.io.dialects.hf_base import PREFIX, Draft, FileType, Inexpressible, Reading
from veneer.io.dialects.hf_names import is_target, pattern_value, patterns_for
from veneer.io.records import Record, Site, Spot, near
from veneer.method import Method, Shape, VeneerError

Parts = Mapping[str, Tensor]
#: (a method, the dtypes of the base weights that it is on) → what whoever saves or loads it should know
Remarks = Callable[[Any, Collection[torch.dtype]], Sequence[str]]

#: config keys that every family understands
_KEYS: dict[str, Any] = {"init_weights": True, "exclude_modules": None}
_KINDS = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding", "attention": "MultiheadAttention",
          "out_proj": "MultiheadAttention's out_proj"}


@dataclass(frozen=True)
class Option:
    """A config key: the method's option it is, and PEFT's default.

    pattern: the config key in which PEFT keeps other values for some modules. training: without influence on what
    a trained adapter computes. where: the weights on which it says something. write: its value in the file for a
    method, if not the option's own; read: the other way round, None to leave the option to another key.
    """

    name: str
    default: Any
    pattern: str = ""
    training: bool = False
    where: Callable[[Shape], bool] = lambda shape: True
    write: Callable[[Any], Any] | None = None
    read: Callable[[Any], Any] = lambda value: value

    def of(self, method: Method) -> Any:
        return getattr(method, self.name) if self.write is None else self.write(method)


def _same(parts: Parts, layout: Layout) -> Parts:
    return parts


@dataclass(frozen=True)
class Family(FileType):
    """One method in PEFT's files.

    layers: the kinds of layers PEFT has it for. carried: what PEFT's own convolution takes over from an unusual one.
    options: by config key. parts: part of the adapter → last piece of
    its key. copies: last pieces of keys under which PEFT repeats for every layer what all share → its part.
    to_file, from_file: between the adapter's shapes and the file's; what does not fit is left as it is. derived: the
    option that PEFT works out from the targets. refusal: why PEFT computes something else with these parts, or None.
    on_save, on_load: sentences for the report; on_load only for files that PEFT wrote.
    """

    peft_type: str
    method: type[Method]
    layers: tuple[str, ...]
    options: Mapping[str, Option]
    parts: Mapping[str, str]
    more_keys: Mapping[str, Any] = field(default_factory=lambda: dict(_KEYS))
    passed_over: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    bias_only: str = ""
    shared: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    to_file: Callable[[Parts, Layout], Parts] = _same
    from_file: Callable[[Parts, Layout], Parts] = _same
    carried: tuple[str, ...] = ()
    derived: str = ""
    refusal: Callable[[Method, Site, Collection[str]], str | None] = lambda method, site, parts: None
    on_save: Remarks = lambda method, dtypes: ()
    on_load: Remarks = lambda method, dtypes: ()

    @property
    def keys(self) -> Mapping[str, Any]:
        patterns: dict[str, Any] = {option.pattern: {} for option in self.options.values() if option.pattern}
        bias = {"bias": "none"} if self.bias_only else {}
        return {**self.more_keys, **bias, **patterns, **{key: option.default for key, option in self.options.items()}}

    @property
    def repeated(self) -> Collection[str]:
        return tuple(self.copies)

    def piece(self, part: str, kind: str) -> str:
        return self.parts[part]

    # -- writing ----------------------------------------------------------------------------------------
    def place(self, draft: Draft, records: Sequence[Record]) -> None:
        for record in records:
            site = draft.base.sites[record.name]
            spot = self._spot(site)
            reason = self.refusal(record.method, site, record.tensors)
            if reason is not None:
                raise Inexpressible(f"{site.name!r}: {reason}")
            draft.modules.append(spot.module)
            draft.methods[spot.module] = record.method
            draft.wrapped[spot.module] += 1
            self.put(draft, record, f"{PREFIX}{spot.module}.", site.layout)
        self._check_shared(draft, records)

    def put(self, draft: Draft, record: Record, stem: str, layout: Layout) -> None:
        whole = {part: key for key, part in self.shared.items()}
        own = {part: tensor for part, tensor in record.tensors.items() if part not in whole}
        draft.tensors |= {stem + self.parts[part]: tensor for part, tensor in self.to_file(own, layout).items()}
        draft.tensors |= {key: record.tensors[part] for part, key in whole.items() if part in record.tensors}

    def _spot(self, site: Site) -> Spot:
        spot = site.spots[0]
        if not spot.module:
            raise Inexpressible(f"{site.name!r} belongs to the model itself, not to a module in it")
        if len(site.spots) > 1:
            raise Inexpressible(f"{site.name!r} is tied, and PEFT's {self._title} adapts each of its places apart")
        layer = layer_of(site, spot)
        if spot.param != "weight" or layer not in self.layers:
            raise Inexpressible(f"PEFT has {self._title} on {self._layers}, and {site.name!r} is {layer}")
        if self._odd(site):
            raise Inexpressible(f"{site.name!r} is a convolution with {self._odd(site)}, on which PEFT's {self._title} "
                                "is another function or none")
        return spot

    def _check_shared(self, draft: Draft, records: Sequence[Record]) -> None:
        """One state for all, of the size that PEFT would give it."""
        methods = list(dict.fromkeys(record.method for record in records))
        if self.shared and len(methods) > 1:
            raise Inexpressible(f"{methods[0]} and {methods[1]} share nothing with each other, and all adapters of a "
                                "PEFT file share one state")
        if self.derived:
            shapes = {record.name: draft.base.sites[record.name].layout.shape for record in records}
            theirs = dataclasses.replace(methods[0], **{self.derived: None}).settle(shapes)
            mine, size = getattr(methods[0], self.derived), getattr(theirs, self.derived)
            if mine != size:
                raise Inexpressible(f"{self.derived}={mine}, and PEFT always takes the largest sizes among the weights "
                                    f"it adapts, here {size}")

    def config(self, draft: Draft) -> dict[str, Any]:
        found: dict[str, Any] = {} if "init_weights" not in self.keys else {"init_weights": True}
        for key, option in self.options.items():
            found |= self._entries(draft, key, option)
        sites = [draft.base.by_path[f"{module}.weight"] for module in draft.modules]
        draft.notes += _remarks(self.on_save, draft.methods.values(), sites)
        return found

    def _entries(self, draft: Draft, key: str, option: Option) -> dict[str, Any]:
        """A config key with the value that most modules have, and what is said of the others."""
        values = {name: option.of(method) for name, method in draft.methods.items()
                  if option.where(draft.base.by_path[f"{name}.weight"].layout.shape)}
        common = Counter(values.values()).most_common(1)[0][0] if values else option.default
        others = [name for name, value in values.items() if value != common]
        if option.pattern:
            return {key: common, option.pattern: patterns_for(values, common)}
        if others and option.training:
            draft.notes.append(f"{key} is {common} in adapter_config.json, which has one value for all weights; "
                               "veneer.json keeps the real ones")
        elif others:
            raise Inexpressible(f"{option.name} is {common} on most weights and {values[others[0]]} on {others[0]!r}; "
                                f"a PEFT file has one {key} for all")
        return {key: common}

    # -- reading ----------------------------------------------------------------------------------------
    def method_for(self, config: Mapping[str, Any], module: str) -> Method:
        """The method that a checked config means for a module, before what PEFT works out from the targets."""
        found: dict[str, Any] = {}
        for key, option in self.options.items():
            value = pattern_value(config[option.pattern], module, config[key]) if option.pattern else config[key]
            value = option.read(value)
            if value is not None or option.name not in found:
                found[option.name] = value
        return self.method(**found)

    def read(self, reading: Reading, key: str, name: str, tensor: Tensor) -> bool:
        module, _, piece = name.rpartition(".")
        if piece in self.copies:
            reading.share(self.copies[piece], key, tensor)
            return True
        part = next((part for part, mine in self.parts.items() if mine == piece), None)
        if part is None:
            return False
        site = reading.map.by_path.get(f"{module}.weight")
        if site is None:
            reading.problems.append(f"unexpected: {key!r}: no module {module!r} here"
                                    f"{near(module, reading.map.modules, reading.problems)}")
            return True
        layer = layer_of(site, next(spot for spot in site.spots if spot.module == module))
        if layer not in self.layers:
            reading.problems.append(f"unexpected: {key!r}: PEFT has {self._title} on {self._layers}, and {module!r} is "
                                    f"{layer} here")
            return True
        self._refuse(site, module)
        reading.put(site, self.method_for(reading.config, module), part, tensor, key)
        return True

    def _refuse(self, site: Site, module: str) -> None:
        if len(site.spots) > 1:
            raise VeneerError(f"{module!r} shares a tied weight here, and PEFT's {self._title} adapted it alone. Untie "
                              "them first: give one a clone of the weight")
        if self._odd(site):
            raise VeneerError(f"{site.name!r} is a convolution with {self._odd(site)}; PEFT's {self._title} on it "
                              "cannot be loaded")

    def _odd(self, site: Site) -> str:
        """What PEFT does not carry over from the layer."""
        return ", ".join(text for text in site.unusual if text.partition("=")[0] not in self.carried)

    def finish(self, reading: Reading) -> None:
        mine = {name: record for name, record in reading.records.items() if isinstance(record.method, self.method)}
        targets = self._targets(reading)
        sites = {name: reading.map.sites[name] for name in {**mine, **targets}}
        shapes = {name: site.layout.shape for name, site in sites.items() if name in mine or site.is_linear}
        for name, record in mine.items():
            record.method = record.method.settle(shapes)
            reason = self.refusal(record.method, sites[name], record.tensors)
            if reason is not None:
                reading.problems.append(f"{name!r}: {reason}; it cannot be loaded")
                del reading.records[name]
                continue
            reading.expect(record, f"{reading.prefix}{sites[name].spots[0].module}.", self.parts)
            record.tensors = self.adopt(reading, record, sites[name])
        self._give_shared(reading, mine)
        for name, module in targets.items():
            if name not in mine:
                reading.problems.append(f"missing: target module {module!r} has no '{reading.prefix}{module}."
                                        f"{self._piece(mine.values())}' in the file")
        if reading.config["peft_version"]:
            methods = [record.method for record in mine.values()]
            reading.notes += _remarks(self.on_load, methods, [sites[name] for name in mine])

    def adopt(self, reading: Reading, record: Record, site: Site) -> dict[str, Tensor]:
        """The parts of a record as the adapter has them."""
        return dict(self.from_file(record.tensors, site.layout))

    def _piece(self, others: Iterable[Record]) -> str:
        """The first tensor of a weight, going by what other weights in the file have."""
        have = next((record.tensors for record in others), {})
        return next((piece for part, piece in self.parts.items() if part in have), next(iter(self.parts.values())))

    def _targets(self, reading: Reading) -> dict[str, str]:
        """Weights that the config targets → their modules."""
        found = {}
        for module in reading.map.modules:
            site = reading.map.by_path.get(f"{module}.weight")
            if site is not None and is_target(reading.config, module):
                found[site.name] = module
        return found

    def _give_shared(self, reading: Reading, mine: Mapping[str, Record]) -> None:
        """What all share is part of the first weight in the model's order."""
        owner = next((mine[name] for name in reading.map.sites if name in mine), None)
        for key, part in self.shared.items():
            if owner is not None:
                owner.keys[part] = key
        for part, (key, tensor) in reading.shared.items():
            if owner is None:
                reading.problems.append(f"unexpected: {key!r}: the file adapts no weight of this model")
            else:
                owner.tensors[part] = tensor
                owner.keys[part] = key

    # -- without a model --------------------------------------------------------------------------------
    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Counter[str], set[str]]:
        pieces = {*self.parts.values(), *self.copies}
        known = {key for key in tensors if key in self.shared or key.rpartition(".")[2] in pieces}
        modules = {key.removeprefix(PREFIX).rpartition(".")[0]: None for key in known
                   if key.rpartition(".")[2] in self.parts.values()}
        return Counter(self.summary({**self.keys, **config}, module) for module in modules), known

    def summary(self, config: Mapping[str, Any], module: str) -> str:
        """What a config says about the adapter of one module, in a few words."""
        rank = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        return f"{self._title} of rank {rank}"

    @property
    def _title(self) -> str:
        return self.method.__name__

    @property
    def _layers(self) -> str:
        *most, last = self.layers
        return f"{', '.join(most)} and {last} layers" if most else f"{last} layers"


def _remarks(of: Remarks, methods: Iterable[Method], sites: Iterable[Site]) -> list[str]:
    dtypes = list(dict.fromkeys(site.dtype for site in sites))
    return list(dict.fromkeys(text for method in dict.fromkeys(methods) for text in of(method, dtypes)))


def layer_of(site: Site, spot: Spot) -> str:
    """The kind of layer, by the name of its class."""
    if spot.kind == "conv":
        return f"Conv{len(site.layout.native) - 2}d"
    return _KINDS.get(spot.kind, "a weight of another kind")

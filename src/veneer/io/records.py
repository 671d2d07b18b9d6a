"""The two things every format translates between: the records of an adapter, and the map of a base model.

A record is one adapted weight with its method and tensors. A site is where a weight sits in a model and how
it is applied. Neither holds a module, so a format is a function of plain data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import attached, hosts
from veneer.hosts import Host, Layout
from veneer.hosts.attention import AttentionHost, OutProjHost
from veneer.hosts.conv import ConvHost
from veneer.hosts.embedding import EmbeddingHost
from veneer.hosts.linear import Conv1DHost, LinearHost
from veneer.method import Method, Shared, VeneerError, nearest
from veneer.sharding import whole
from veneer.weights import Place, Weight, base_modules, scan

#: how a weight is applied, from the most to the least special host
_KINDS: tuple[tuple[type[Host], str], ...] = (
    (Conv1DHost, "conv1d"), (LinearHost, "linear"), (ConvHost, "conv"), (EmbeddingHost, "embedding"),
    (AttentionHost, "attention"), (OutProjHost, "out_proj"))


@dataclass(frozen=True)
class Spot:
    """One place of a weight: the module's name, the parameter's name in it, and its kind."""

    module: str
    param: str
    kind: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.param}" if self.module else self.param


@dataclass(frozen=True)
class Site:
    """A weight of the base: its Veneer name, all its places (more than one = tied), its layout."""

    name: str
    spots: tuple[Spot, ...]
    layout: Layout
    dtype: torch.dtype
    is_linear: bool
    is_head: bool
    #: of a convolution: those of groups, dilation and padding mode that are unusual, of which PEFT may not take over
    #: all
    unusual: tuple[str, ...] = ()


@dataclass
class BaseMap:
    """What a format may know of a base model: its weights, module names, and what belongs to which module."""

    sites: dict[str, Site]
    modules: list[str]
    #: every name a place has, module tied twice or not: parameter path → site
    by_path: dict[str, Site] = field(default_factory=dict)
    #: modules that hold persistent buffers, themselves or below
    buffered: set[str] = field(default_factory=set)
    class_name: str = ""
    name_or_path: str | None = None
    is_causal_lm: bool = False
    #: the module that transformers ties to the head, by the model's own config
    tied_embedding: str | None = None
    #: False: made without the model, which may have modules that are not here
    known: bool = True
    #: False: the model may have weights that are not here
    everything: bool = True


@dataclass
class Record:
    """One adapted weight: tensors by their name in the adapter; keys: by what name each stands in a file; restarted:
    those that are no part of the file, since starting the adapter from the base weight gives them again."""

    name: str
    method: Method
    tensors: dict[str, Tensor]
    keys: dict[str, str] = field(default_factory=dict)
    restarted: frozenset[str] = frozenset()


def base_weights(model: nn.Module) -> list[Weight]:
    """The weights of the base itself: without biases that a merge has added to layers that had none."""
    return [weight for weight in scan(model) if not any(_is_added(place) for place in weight.places)]


def _is_added(place: Place) -> bool:
    module = place.module
    return isinstance(module, Host) and place.param in module.veneer.kept and module.veneer.kept[place.param] is None


def base_map(model: nn.Module, weights: list[Weight]) -> BaseMap:
    """The map of a model, adapted or not."""
    sites = {weight.name: _site(weight) for weight in weights}
    found = BaseMap(sites, [name for name, _ in base_modules(model) if name])
    for site in sites.values():
        for spot in site.spots:
            found.by_path[spot.path] = site
    adapters = {id(part) for _, host in hosts(model) for part in host.adapters.modules()}
    for name, module in model.named_modules():
        if id(module) not in adapters and set(module._buffers) - module._non_persistent_buffers_set:
            parts = name.split(".")
            found.buffered.update(".".join(parts[:i + 1]) for i in range(len(parts)))
    kind = type(model).veneer_base if isinstance(model, Host) else type(model)  # type: ignore[attr-defined]
    found.class_name = kind.__name__
    path = getattr(model, "name_or_path", None)
    found.name_or_path = path if isinstance(path, str) and path else None
    found.tied_embedding = _tied_embedding(model)
    found.is_causal_lm = (("CausalLM" in kind.__name__ or "LMHead" in kind.__name__)
                          and callable(getattr(model, "prepare_inputs_for_generation", None)))
    return found


def _tied_embedding(model: nn.Module) -> str | None:
    ask = getattr(model, "get_input_embeddings", None)
    if not callable(ask) or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    table = ask()
    return next((name for name, module in model.named_modules() if module is table), None)


def records_of(model: nn.Module, name: str) -> list[Record]:
    """The adapter's records in the model's order, tensors as trained (same dtype, same device, not copied)."""
    found: list[Record] = []
    states: dict[Method, Shared] = {}
    for weight, adapter in attached(model, name):
        if adapter.on_meta():
            raise VeneerError(f"save: the adapter of {weight.name!r} is on the meta device and has no values yet; "
                              "call model.to_empty(device=...) and load the base weights first")
        assert adapter.method is not None
        packed, state = adapter.packed(), adapter.shared_state()
        if state is not None and states.setdefault(adapter.method, state) is not state:
            raise VeneerError(f"save: adapter {name!r} was attached in parts, and {weight.name!r} does not share its "
                              "state with the weights before it; one file holds one state for each method. Give each "
                              "part an adapter name of its own, or attach to the whole model at once")
        if state is not None and all(record.method != adapter.method for record in found):
            packed |= adapter.packed_shared()
        tensors = {key: whole(value.detach()) for key, value in packed.items()}
        found.append(Record(weight.name, adapter.method.unmoved(), tensors))
    return found


#: as many problems are shown, and looked up for their nearest match, which is slow work for hundreds
SHOWN = 20


def near(word: str, known: Iterable[str], problems: list[str]) -> str:
    """The nearest match as a clause, for the problems that will be shown."""
    return nearest(word, known) if len(problems) < SHOWN else ""


def expected_tensors(method: Method, layout: Layout, owner: bool) -> dict[str, Tensor]:
    """What an adapter of this settled method on this weight consists of: meta tensors by name.

    owner: of the weights with this method, it is the first, with which the state that all share is saved.
    """
    with torch.device("meta"):
        shared = method.shared(torch.float32)
        adapter = method.build(layout.shape, torch.float32, shared)
        return {**adapter.packed(), **(adapter.packed_shared() if owner else {})}


def _site(weight: Weight) -> Site:
    spots = tuple(Spot(p.module_name, p.param, _kind(p)) for p in weight.places)
    return Site(weight.name, spots, weight.layout, weight.dtype, weight.is_linear, weight.is_head,
                _unusual(weight.places[0]))


def _kind(place: Place) -> str:
    if place.param == "bias" and place.host is not AttentionHost:
        return "bias"
    return next((kind for host, kind in _KINDS if issubclass(place.host, host)), "parameter")


def _unusual(place: Place) -> tuple[str, ...]:
    conv: Any = place.module
    if not issubclass(place.host, ConvHost):
        return ("a forward of its own",) if place.layout.shape.kernel else ()
    found = {f"groups={conv.groups}": conv.groups != 1,
             f"dilation={tuple(conv.dilation)}": any(step != 1 for step in conv.dilation),
             f"padding_mode={conv.padding_mode!r}": conv.padding_mode != "zeros"}
    return tuple(text for text, unusual in found.items() if unusual)

"""Where an adapter's weights sit in their model, as text in the tensor file's header: kind, size and places of each.

With it an adapter's file can be converted without its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from veneer.hosts import Layout
from veneer.io.fingerprint import Fingerprint
from veneer.io.manifest import parse_json
from veneer.io.records import BaseMap, Site, Spot
from veneer.method import VeneerError, parse_dtype

#: the key in the tensor file's metadata
META_SITES = "veneer.sites"
LINEAR = ("linear", "conv1d")


def to_json(base: BaseMap, names: Iterable[str]) -> str:
    """The sites of these weights, and what else of their model a format may ask for."""
    sites = [base.sites[name] for name in names]
    modules = {spot.module for site in sites for spot in site.spots}
    found: dict[str, Any] = {"weights": {site.name: _plain(site) for site in sites}}
    found["buffered"] = sorted(modules & base.buffered)
    found["tied_embedding"] = base.tied_embedding
    return json.dumps(found, separators=(",", ":"))


def _plain(site: Site) -> dict[str, Any]:
    first, shape = site.spots[0], site.layout.shape
    found: dict[str, Any] = {"kind": first.kind, "shape": list(site.layout.native),
                             "dtype": str(site.dtype).removeprefix("torch.")}
    if len(site.spots) > 1 or first.path != f"{site.name}.weight":
        found["places"] = [[spot.module, spot.param, spot.kind] for spot in site.spots]
    if shape.kernel:
        found["kernel"] = list(shape.kernel)
    for key, value in (("transposed", site.layout.transposed), ("lookup", shape.lookup)):
        if value:
            found[key] = True
    if site.is_linear != (first.kind in LINEAR):
        found["linear"] = site.is_linear
    if site.unusual:
        found["unusual"] = list(site.unusual)
    return found


def from_json(text: str, print_: Fingerprint | None, where: str) -> BaseMap:
    """The map that `to_json` wrote, and beside it the other weights of the base, as far as the fingerprint knows them.

    Raises `VeneerError` naming `where` for damaged text.
    """
    data = parse_json(text, where)
    try:
        adapted = {name: _site(name, entry) for name, entry in data["weights"].items()}
        extra = {"buffered": set(data["buffered"]), "tied_embedding": data["tied_embedding"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VeneerError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    others = {} if print_ is None else {name: sample for name, sample in print_.samples.items() if name not in adapted}
    sites = dict(adapted)
    for name, sample in others.items():
        # A name is a module's or a parameter's: nothing is laid on these, so that both may stand here.
        module, _, param = name.rpartition(".")
        spots = (Spot(module, param, "parameter"), Spot(name, "weight", "parameter"))
        sites[name] = Site(name, spots, layout(sample.shape), torch.float32, False, False)
    return mapped(sites, known=False, everything=print_ is not None, **extra)


def _site(name: str, entry: dict[str, Any]) -> Site:
    kind = entry["kind"]
    spots = tuple(Spot(*place) for place in entry.get("places", [[name, "weight", kind]]))
    seen = layout(tuple(entry["shape"]), transposed=entry.get("transposed", False),
                  kernel=tuple(entry.get("kernel", ())), lookup=entry.get("lookup", False))
    return Site(name, spots, seen, parse_dtype(entry["dtype"]), entry.get("linear", kind in LINEAR), False,
                tuple(entry.get("unusual", ())))


def layout(shape: tuple[int, ...], *, transposed: bool = False, kernel: tuple[int, ...] = (),
           lookup: bool = False) -> Layout:
    """The layout of a stored weight of which only the shape is there."""
    with torch.device("meta"):
        return Layout.of(torch.empty(shape), transposed=transposed, kernel=kernel, lookup=lookup)


def mapped(sites: dict[str, Site], **more: Any) -> BaseMap:
    """A map of these sites: the modules are those that the places name, and what is above them."""
    by_path = {spot.path: site for site in sites.values() for spot in site.spots}
    modules: dict[str, None] = {}
    for site in sites.values():
        for spot in site.spots:
            parts = spot.module.split(".")
            modules.update({".".join(parts[:i + 1]): None for i in range(len(parts)) if spot.module})
    return BaseMap(sites, list(modules), by_path, **more)

"""info: what an adapter is, from its files alone or from a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.inspect.summary import adapters
from veneer.io import native, store
from veneer.io.dialects import hf
from veneer.method import Method


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter. methods: text → number of weights; details: what else its tensors show, likewise; bytes: of its
    tensors; base and versions as far as known."""

    title: str
    format: str
    methods: dict[str, int]
    weights: int
    parameters: int
    bytes: int
    base: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.format}",
                 f"  {self.weights} weights, {self.parameters:,} parameters, {self.bytes:,} bytes"]
        lines += [f"  {text} on {count} weights" for text, count in (*self.methods.items(), *self.details.items())]
        known = {k: v for k, v in self.base.items() if v is not None}
        if known:
            lines.append("  base: " + ", ".join(f"{k} {v}" for k, v in known.items()))
        if self.versions:
            lines.append("  written by " + ", ".join(f"{k} {v}" for k, v in self.versions.items())
                         + (f", seed {self.seed}" if self.seed is not None else ""))
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Info:
    """The adapters of a model, or the one at a path."""

    adapters: tuple[AdapterInfo, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.adapters)) or "no adapters"


def info(path_or_model: str | Path | nn.Module) -> Info:
    """What is at a path (no model and no network needed) or on a model: methods, weights, size, base, versions.

    Raises `VeneerError` for a path without an adapter or with a damaged one.
    """
    if isinstance(path_or_model, nn.Module):
        return Info(tuple(_of_model(path_or_model)))
    return Info((_of_path(path_or_model),))


def _of_model(model: nn.Module) -> list[AdapterInfo]:
    found = []
    for name, summary in adapters(model).items():
        methods = Counter(_short(a.method) for a in summary.weights.values() if a.method is not None)
        params = {id(p): p for a in summary.weights.values() for p in a.parameters()}
        size = sum(p.numel() * p.element_size() for p in params.values())
        state = "merged" if summary.merged else "live" if summary.live else "not live"
        found.append(AdapterInfo(name, f"on a {type(model).__name__}, {state}", dict(methods), len(summary.weights),
                                 summary.parameters, size, details=_details(
                                     (a.method, a.state_dict()) for a in summary.weights.values()
                                     if a.method is not None and not a.on_meta())))
    return found


def _of_path(path: str | Path) -> AdapterInfo:
    stored = store.read(path)
    count = sum(t.numel() for t in stored.tensors.values())
    size = sum(t.numel() * t.element_size() for t in stored.tensors.values())
    manifest = stored.manifest
    if manifest is None or not manifest.plan:
        assert stored.config is not None
        methods, weights = hf.describe(stored.config, stored.tensors)
        base = {"name_or_path": stored.config.get("base_model_name_or_path")}
        versions = {"peft": str(stored.config["peft_version"])} if stored.config.get("peft_version") else {}
        return AdapterInfo(str(path), "PEFT format", methods, weights, count, size, base, versions,
                           notes=tuple(stored.notes))
    methods = dict(Counter(_short(method) for method in manifest.plan.values()))
    kind, details = "PEFT format", {}
    if manifest.layout == "native":
        kind = f"native format ({manifest.reason})"
        records, _ = native.decode(manifest.plan, stored.tensors)
        details = _details((record.method, record.tensors) for record in records)
    return AdapterInfo(str(path), kind, methods, len(manifest.plan), manifest.parameters, size, manifest.base,
                       manifest.versions, manifest.seed, tuple(stored.notes), details)


def _details(found: Iterable[tuple[Method, Mapping[str, Tensor]]]) -> dict[str, int]:
    """How many weights are described alike, by the numbers in it."""
    counts = Counter(method.describe(tensors) for method, tensors in found)
    return {text: counts[text] for text in sorted(filter(None, counts), key=_numbers)}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _short(method: Method) -> str:
    text = str(method)
    return text if len(text) < 120 else text[:117] + "…"

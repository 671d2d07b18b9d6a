"""veneer.json: what an adapter is, for people, for `info`, and for loading it back exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.io.fingerprint import Fingerprint
from veneer.method import Method, VeneerError, method_from_dict, method_to_dict

FORMAT_VERSION = 1
#: keys of the tensor file's own metadata
META_MANIFEST, META_BASE, META_CONFIG = "veneer.manifest", "veneer.base", "veneer.adapter_config"


@dataclass
class Manifest:
    """plan: weight name → method. layout: "peft" or "native" (how the tensor file's keys read)."""

    layout: str
    plan: dict[str, Method]
    tensors_sha256: str
    parameters: int
    seed: int | None = None
    reason: str = ""
    generation: int = 0
    base: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as JSON text; the plan grouped, one method with the weights it is on."""
        groups: dict[Method, list[str]] = {}
        for name, method in self.plan.items():
            groups.setdefault(method, []).append(name)
        plan = [{**method_to_dict(method), "weights": names} for method, names in groups.items()]
        return json.dumps({
            "format_version": FORMAT_VERSION, "layout": self.layout, "reason": self.reason,
            "versions": self.versions, "seed": self.seed, "parameters": self.parameters, "base": self.base,
            "tensors_sha256": self.tensors_sha256, "generation": self.generation, "plan": plan}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read it back. Raises `VeneerError`, naming `where`, for a newer format or damaged text."""
        try:
            data = json.loads(text)
            version = data["format_version"]
            if version > FORMAT_VERSION:
                raise VeneerError(f"{where} is of format version {version}; this Veneer reads up to "
                                  f"{FORMAT_VERSION}: upgrade veneer")
            return cls(data["layout"], _plan(data["plan"]), data["tensors_sha256"], data["parameters"],
                       data["seed"], data["reason"], data["generation"], data["base"], data["versions"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise VeneerError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def _plan(groups: list[Mapping[str, Any]]) -> dict[str, Method]:
    plan: dict[str, Method] = {}
    for group in groups:
        config = {key: value for key, value in group.items() if key != "weights"}
        method = method_from_dict(config)
        plan.update(dict.fromkeys(group["weights"], method))
    return plan


def base_of(text: str) -> Fingerprint:
    """The fingerprint out of the tensor file's metadata."""
    return Fingerprint.from_dict(json.loads(text))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises `VeneerError` naming `where` when it is none."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise VeneerError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise VeneerError(f"{where} should hold a JSON object, not a {type(data).__name__}")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_json(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A file's text. Raises `VeneerError` for one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VeneerError(f"{path} is not text: {error}") from error

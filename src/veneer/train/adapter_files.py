"""Finding an adapter that the command line names, and the base model that its own files name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.io.store import MANIFEST, NATIVE_TENSORS, PEFT_CONFIG, PEFT_PICKLE, PEFT_TENSORS

_IN_RUN = "adapter"  # the folder of the adapter in a folder that `veneer train` wrote


def find_adapter(path: str) -> tuple[str, str]:
    """(the adapter's path, one line for the user or ""): a run's folder stands for the adapter in it."""
    inside = Path(path) / _IN_RUN
    if holds_adapter(Path(path)) or not holds_adapter(inside):
        return path, ""
    return str(inside), f"{path} is the folder of a run; its adapter is {inside}"


def holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PEFT_TENSORS, PEFT_PICKLE, NATIVE_TENSORS))


def run_config(adapter: str) -> dict[str, Any] | None:
    """What `veneer train` wrote beside the adapter, or None. A model's own config.json is no such file."""
    found = _mapping(_folder(adapter).resolve().parent / "config.json")
    return found if isinstance(found.get("model"), dict) and "settings" in found else None


def named_base(adapter: str) -> str | None:
    """The base model as the adapter's own files name it, or None."""
    folder = _folder(adapter)
    base = _mapping(folder / MANIFEST).get("base")
    name = base.get("name_or_path") if isinstance(base, dict) else None
    name = name or _mapping(folder / PEFT_CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _folder(adapter: str) -> Path:
    path = Path(adapter)
    return path.parent if path.is_file() else path


def _mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none (loading the adapter tells what is wrong with it)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

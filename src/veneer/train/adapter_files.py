"""Finding an adapter that the command line names, and what is written beside it of the run that trained it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.io.files import write_all
from veneer.io.save import write_text
from veneer.io.store import MANIFEST, NATIVE_TENSORS, PEFT_CONFIG, PEFT_PICKLE, PEFT_TENSORS

_IN_RUN = "adapter"  # the folder of the adapter in a folder that `veneer train` wrote
RECORD = "run.json"  # in an adapter's own folder, where that is the run's too


def find_adapter(path: str) -> tuple[str, str]:
    """(the adapter's path, one line for the user or ""): a run's folder stands for the adapter in it."""
    inside = Path(path) / _IN_RUN
    if holds_adapter(Path(path)) or not holds_adapter(inside):
        return path, ""
    return str(inside), f"{path} is the folder of a run; its adapter is {inside}"


def holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PEFT_TENSORS, PEFT_PICKLE, NATIVE_TENSORS))


def write_record(folder: Path, config: Mapping[str, Any]) -> None:
    """Write beside the adapter in `folder` how it was trained: "model", the base's settings, and more. It names the
    adapter that it is of, which another may replace. Raises `VeneerError` where it cannot be written."""
    text = json.dumps({**config, "adapter": _hash(folder)}, indent=2, ensure_ascii=False) + "\n"
    write_all(folder, [(RECORD, functools.partial(write_text, text))])


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `write_record` wrote into an adapter's folder; None where it is not there or is of another adapter."""
    found, here = _mapping(folder / RECORD), _hash(folder)
    return found if isinstance(found.get("model"), dict) and here in (None, found.get("adapter")) else None


def _hash(folder: Path) -> str | None:
    return _mapping(folder / MANIFEST).get("tensors_sha256")


def run_config(adapter: str) -> dict[str, Any] | None:
    """What `veneer train` wrote beside the adapter, or None. A model's own config.json is no such file."""
    own = read_record(_folder(adapter))
    if own is not None:
        return own
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

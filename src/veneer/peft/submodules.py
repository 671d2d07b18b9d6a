"""Modules that are imported when they are first asked for, as attributes of the package that they are in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def lazily(package: str, *names: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package: its submodules `names`, and `AttributeError` for everything else."""
    def find(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return find

"""A folder that appears whole, under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from veneer.io.files import sync_directory
from veneer.method import VeneerError

_STALE_SECONDS = 24 * 3600


@contextlib.contextmanager
def new_folder(path: Path, owner: str, overwrite: bool = False) -> Iterator[Path]:
    """Inside the context: an empty folder to fill. At its end that becomes `path`; after an error it is gone.

    A process that is killed leaves nothing under the name `path` that was not there before: at worst nothing at all,
    in the instant between two renames that replace an older folder. What it leaves has a name beginning with a dot.
    Raises `VeneerError` for a `path` that is there and not empty, unless `overwrite` and it is a model's folder.
    """
    check_free_name(path, owner, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.veneer-tmp-{uuid.uuid4().hex}"
        temporary.mkdir()
    except OSError as error:
        raise VeneerError(f"{owner}: cannot make a folder in {path.parent}: {error.strerror or error}") from error
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        sync_directory(temporary)
        if path.exists() and any(path.iterdir()):
            os.replace(path, old)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise VeneerError(f"{owner}: could not write {path}: {error.strerror or error}. What was there before is "
                          "unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _sweep(path)


def check_free_name(path: Path, owner: str, overwrite: bool = False) -> None:
    """Raise `VeneerError` where `new_folder` would."""
    if not path.exists():
        return
    if not path.is_dir():
        raise VeneerError(f"{owner}: {str(path)!r} is there already and is a file")
    names = {p.name for p in path.iterdir()}
    if names and not overwrite:
        raise VeneerError(f"{owner}: {str(path)!r} is there already and is not empty; overwrite=True replaces it")
    if names and "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        raise VeneerError(f"{owner}: {str(path)!r} does not look like a model's folder (no config.json and no "
                          "safetensors file in it), so it is not replaced; remove it yourself, or take another name")


def _sweep(path: Path) -> None:
    """Remove what a killed process of an earlier day has left; a younger one may belong to one going on."""
    for leftover in path.parent.glob(f".{path.name}.veneer-tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)

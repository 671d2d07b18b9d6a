"""A folder that appears whole, under its name, or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from veneer.io.files import TEMPORARY, sweep, sync_directory
from veneer.method import VeneerError


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
        temporary = path.parent / f".{path.name}{TEMPORARY}{uuid.uuid4().hex}"
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
    except BaseException as error:  # KeyboardInterrupt between the two renames too
        outcome = _put_back(path, temporary, old)
        if not isinstance(error, OSError):
            raise
        raise VeneerError(f"{owner}: could not write {path}: {error.strerror or error}. {outcome}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sweep(path.parent, f".{glob.escape(path.name)}{TEMPORARY}*")


def _put_back(path: Path, temporary: Path, old: Path) -> str:
    """After an error: what was at `path` is there again, unless the new folder is; a sentence that says which."""
    kept = f", and what was there before is in {old}" if old.exists() else ""
    if not temporary.exists():
        return f"The new folder is in its place, but it is not sure that a loss of power would leave it there{kept}"
    if old.exists() and not path.exists():
        try:
            os.replace(old, path)
        except OSError:
            return f"What was there before is in {old}"
    return "What was there before is unchanged"


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

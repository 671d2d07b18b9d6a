"""Files that change all at once: temporary name, sync to disk, rename.

An adapter is several files, and no file system renames several at once. So one of them is the adapter: the
tensor file, which carries the config and the manifest in its header too. Its rename is the moment at which
the new adapter takes the old one's place; the files beside it are copies for people and for other tools.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from veneer.method import VeneerError

Writer = Callable[[IO[bytes]], None]
#: in the names of what is not yet, or no longer, in its place
TEMPORARY = ".veneer-tmp-"
_STALE_SECONDS = 24 * 3600


def write_all(directory: Path, files: Sequence[tuple[str, Writer]], *, hide: Iterable[str] = (),
              drop: Iterable[str] = ()) -> int:
    """Write `files` into `directory` (made if need be) so that the first of them appears whole or not at all.

    files: (name, writer) in the order in which they take their places, after all of them have been written
    and synced under temporary names. hide: names removed just before the first takes its place, because they
    would describe it wrongly. drop: names removed at the end.
    Returns the number of bytes written. Raises `VeneerError` when something could not be written: what was
    there before is then still there.
    """
    made = _make(directory)
    temps: list[tuple[Path, Path]] = []
    outcome = "What was there before is unchanged"
    try:
        for name, writer in files:
            temp = directory / f"{TEMPORARY}{uuid.uuid4().hex}"
            temps.append((temp, directory / name))
            with open(temp, "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        size = sum(temp.stat().st_size for temp, _ in temps)
        outcome = "Either the old adapter or the new one is there, whole"
        _put_in_place(directory, temps, hide, drop)
    except OSError as error:
        names = ", ".join(name for name, _ in files)
        raise VeneerError(f"save: could not write {names} into {directory}: {error.strerror or error}"
                          f"{_free(directory)}. {outcome}") from error
    finally:
        for temp, _ in temps:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()
    sweep(directory, f"{TEMPORARY}*")
    return size


def _make(directory: Path) -> bool:
    if directory.exists() and not directory.is_dir():
        raise VeneerError(f"save needs a directory, and {directory} is a file")
    if directory.is_dir():
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VeneerError(f"save: cannot make the directory {directory}: {error.strerror}") from error
    return True


def _put_in_place(directory: Path, temps: Sequence[tuple[Path, Path]], hide: Iterable[str],
                  drop: Iterable[str]) -> None:
    for name in hide:
        (directory / name).unlink(missing_ok=True)
    for temp, final in temps:
        os.replace(temp, final)
    for name in drop:
        (directory / name).unlink(missing_ok=True)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory written to disk."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(directory: Path) -> str:
    try:
        return f" ({shutil.disk_usage(directory).free:,} bytes free)"
    except OSError:
        return ""


def sweep(directory: Path, pattern: str) -> None:
    """Remove what a killed process of an earlier day has left; a younger one may belong to one going on."""
    for leftover in directory.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink()

"""A folder takes the place of an older one whole, or not at all, whatever stops it."""

from __future__ import annotations

import errno
import os

import pytest

from veneer.io import folder
from veneer.io.folder import new_folder
from veneer.method import VeneerError


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("old")
    return made


def replace(path):
    with new_folder(path, "test", overwrite=True) as made:
        (made / "config.json").write_text("new")


def text(path):
    return (path / "config.json").read_text()


def stop_at(monkeypatch, number, error, name="replace", where=os):
    """The call `number` of a function raises `error`."""
    calls, real = [], getattr(where, name)

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return real(*args)

    monkeypatch.setattr(where, name, stopped)


def test_an_older_folder_is_replaced_and_nothing_is_left(path):
    replace(path)
    assert text(path) == "new"
    assert [p.name for p in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_at_a_rename_the_old_one_is_back(path, monkeypatch, number):
    stop_at(monkeypatch, number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        replace(path)
    assert text(path) == "old"
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_rename_that_fails(path, monkeypatch):
    stop_at(monkeypatch, 2, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(VeneerError, match=r"write .*: Input/output error\. What was there before is unchanged"):
        replace(path)
    assert text(path) == "old"


def test_the_last_sync_fails(path, monkeypatch):
    stop_at(monkeypatch, 2, OSError(errno.EIO, "Input/output error"), "sync_directory", folder)
    with pytest.raises(VeneerError, match=r"The new folder is in its place.* what was there before is in") as error:
        replace(path)
    assert text(path) == "new"
    kept = [p for p in path.parent.iterdir() if p != path]
    assert [text(p) for p in kept] == ["old"]
    assert str(kept[0]) in str(error.value)
    replace(path)
    os.utime(kept[0], (1, 1))
    replace(path)
    assert [p.name for p in path.parent.iterdir()] == ["model"], "swept a day later"

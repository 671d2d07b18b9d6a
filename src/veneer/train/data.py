"""Training and held-out examples from files (JSONL, JSON, CSV) or from a generator."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.train.forms import DataError, Example, RowError, examples_from_rows
from veneer.train.schema import ConfigError
from veneer.train.settings import DataSettings


@dataclass(frozen=True, kw_only=True)
class Dataset:
    train: list[Example]
    heldout: list[Example]


def load_data(settings: DataSettings, base: Path) -> Dataset:
    """The training and held-out examples named by the config. Raises `DataError` or `ConfigError`."""
    if settings.generator is not None:
        return _generate(settings, base)
    train = read_files(_paths(settings.train), base)
    if settings.heldout is not None:
        heldout = read_files(_paths(settings.heldout), base)
    else:
        train, heldout = split(train, settings.heldout_share)
    return Dataset(train=with_system(train, settings.system), heldout=with_system(heldout, settings.system))


def split(examples: list[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held-out) parts; the held-out part is drawn at random, the same for the same rows and seed."""
    if share <= 0:
        return examples, []
    count = round(len(examples) * share)
    if not 0 < count < len(examples):
        raise ConfigError(
            f"data.heldout_share {share} of {len(examples)} examples leaves {len(examples) - count} to train on "
            f"and {count} held out; both need at least one"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [e for i, e in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]


def with_system(examples: list[Example], system: str | None) -> list[Example]:
    """Chats without a system message get this one."""
    if system is None:
        return examples
    first = {"role": "system", "content": system}
    return [
        Example(place=e.place, form=e.form, messages=(first, *e.messages))
        if e.is_chat and e.messages[0]["role"] != "system"
        else e
        for e in examples
    ]


# -- files and generators → rows ------------------------------------------------------------------------------


def read_files(paths: Sequence[str], base: Path) -> list[Example]:
    """Examples of all files, in their order. Raises `DataError`."""
    return examples_from_rows(row for name in paths for row in read_rows(name, base))


def read_rows(name: str, base: Path) -> list[tuple[str, Any]]:
    """(place, row) of every row of a file; a row that cannot be read is a `RowError`. Raises `DataError`."""
    path = base / name
    if not path.is_file():
        raise DataError(f"no data file {name!r} (looked for {str(path)!r}){_siblings(path)}")
    found = list(_READERS[_kind(path)](path))
    if not found:
        raise DataError(f"the data file {name!r} has no rows")
    return found


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise DataError(f"{path.name}: unknown kind of data file {kind!r}; possible: {', '.join(_READERS)}")
    return kind


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"{path.name}:{number}", RowError(f"not valid JSON ({error.msg}, column {error.colno})")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_content(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise DataError(f"{path.name} must hold a list of rows, got {kind}; for one row a line, use .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}[row {number}]", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(_content(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                yield place, RowError(f"not as many fields as the header ({', '.join(reader.fieldnames or ())})")
            else:
                yield place, row
    except csv.Error as error:
        yield f"{path.name}:{reader.line_num}", RowError(f"not valid CSV ({error})")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _paths(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {str(path.parent)!r} does not exist"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in _READERS)
    return f"; data files there: {', '.join(names[:10])}" if names else "; there is no data file in that folder"


def _generate(settings: DataSettings, base: Path) -> Dataset:
    """Rows made by the user's own Python file, which is run for that."""
    path = base / str(settings.generator)
    if not path.is_file() or path.suffix != ".py":
        raise DataError(f"data.generator must be a Python file; there is none at {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"data.generator: Python cannot load {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = {}
    for part in ("train", "heldout"):
        function = vars(module).get(part)
        if not callable(function):
            raise DataError(f"data.generator: {path.name} has no function {part}()")
        options = settings.generator_options.get(part) or {}
        try:
            rows = function(**options)
        except TypeError as error:
            raise DataError(f"data.generator: {path.name}: {part}({options}): {error}") from None
        examples = examples_from_rows((f"{path.name}:{part}()[{i}]", row) for i, row in enumerate(rows))
        parts[part] = with_system(examples, settings.system)
    return Dataset(train=parts["train"], heldout=parts["heldout"])

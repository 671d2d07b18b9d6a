"""How statistics that a callback lets be collected are kept for the next adapter, and in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veneer.calibrate import calibrate
from veneer.method import Method, VeneerError
from veneer.peft.remembered import remember
from veneer.plan import resolve
from veneer.statistics import Statistics, base_of
from veneer.weights import scan


def statistics_file(path: str | Path) -> Path:
    """The file for a name that PEFT's scripts give, such as "cache.pt": safetensors, whatever the name."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def from_files(model: nn.Module, kind: str, files: Sequence[str | Path | None]) -> bool:
    """Remember the statistics of the first file that is there; whether there was one.

    Raises `VeneerError` for a file of PEFT's in its place, and for statistics of another model.
    """
    for given in files:
        if given is None:
            continue
        file = statistics_file(given)
        if file.is_file():
            found = Statistics.load(file)
            found.check(model)
            remember(model, kind, found)
            return True
        if Path(given).is_file() and Path(given) != file:
            raise VeneerError(f"{given} is no file of Veneer's, which writes {file.name}; PEFT's is a pickle file, "
                              "which can run code when it is opened. Give another name, and collect again")
    return False


def collect(model: nn.Module, hooked: nn.Module, kind: str, rules: Mapping[str, Method], run: Callable[[], Any],
            files: Sequence[str | Path | None], progress: bool = False) -> None:
    """Run the callback with `hooked` being watched, and remember what was seen for the next adapter of `model`.

    rules: for `hooked`, whose weights have the names that they have in `model`. files: where it is written too.
    """
    made = resolve(hooked, scan(hooked), dict(rules))
    found = calibrate(hooked, [None], made, forward=lambda net, batch: run(), mask=lambda batch: None,
                      progress=progress)
    seen = max((int(tensors["count"]) for tensors in found.values()), default=0)
    own = [weight for weight in scan(model) if weight.name in found]
    kept = {weight.name: found[weight.name] for weight in own}
    statistics = Statistics(kept, {name: found.kinds[name] for name in kept}, seen, base_of(own))
    for given in files:
        if given is not None:
            statistics.save(statistics_file(given))
    remember(model, kind, statistics)

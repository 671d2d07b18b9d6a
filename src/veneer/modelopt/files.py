"""save, restore: every adapter of a model with its config, what is off and what is frozen; export: without ModelOpt."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import IO, Any

from torch import nn

from veneer.attach import activate, detach
from veneer.attached import hosts
from veneer.io.files import write_all
from veneer.io.load import load
from veneer.io.manifest import read_json
from veneer.io.save import SaveReport
from veneer.io.save import save as save_adapter
from veneer.merge import merge
from veneer.method import VeneerError
from veneer.modelopt.config import ExportPEFTConfig, PEFTConfig
from veneer.modelopt.convert import Before, refuse_taken
from veneer.modelopt.state import State, forget, record, state_of
from veneer.modelopt.switch import train
from veneer.wrappers import unwrap

STATE = "modelopt_state.json"


def save(model: nn.Module, path: str | Path) -> dict[str, SaveReport]:
    """Write all adapters of a converted model below the directory `path`: a directory for each, as `veneer.save` does
    it, and modelopt_state.json, which has the configs, in which unset fields stay unset, and what is off or frozen.

    Returns a report for each adapter that lies on a layer. Raises `VeneerError` for a model without adapters.
    """
    state, directory = _converted(model, "save"), Path(path)
    _check_names(state)
    reports = {name: save_adapter(model, directory / name, name) for name in state.configs if name not in state.bare}
    modes = [["peft", {"config": config.model_dump(mode="json", exclude_unset=True), "metadata": _marks(model, name)}]
             for name, config in state.configs.items()]
    text = json.dumps({"modelopt_state_dict": modes}, indent=1)
    write_all(directory, [(STATE, functools.partial(_write_text, text))])
    return reports


def restore(model: nn.Module, path: str | Path) -> nn.Module:
    """Put back all adapters that `save` wrote, on a model of the same base: values, configs, what is off and what is
    frozen.

    Returns the model. Raises `VeneerError`, with the model as it was, for another base (see `veneer.load`), for files
    that are damaged, and for a name that is taken.
    """
    directory, inner = Path(path), unwrap(model)
    if not (directory / STATE).is_file():
        raise VeneerError(f"there is no {STATE} in {directory}; restore reads what veneer.modelopt.save wrote")
    saved = _read(directory / STATE)
    for config, _ in saved:
        refuse_taken(model, config.adapter_name)
    done: list[str] = []
    first = Before(inner)
    try:
        for config, marks in saved:
            name = config.adapter_name
            if marks.get("layers"):
                before = Before(inner)
                load(inner, directory / name, name)
                done.append(name)
                before.restore(config)
                _mark(inner, name, marks)
    except VeneerError:
        for name in done:
            detach(inner, name)
        if first.live:
            activate(inner, first.live)
        for param in first.trained:
            param.requires_grad_(True)
        raise
    for config, _ in saved:
        record(model, config)
    return model


def export(model: nn.Module, config: ExportPEFTConfig | dict[str, Any] | None = None, *,
           split_to: str | Path | None = None) -> dict[str, SaveReport]:
    """Give the model without adapters, in place, an ordinary one again.

    split_to: None writes the adapters that are on over the base weights (`veneer.merge`), so that the model goes on
    computing what it does; a directory splits them off instead: each goes into a directory below it that PEFT can load,
    whether it is on or not, and the base is bare. Returns a report for each that was split off.
    Raises `VeneerError` for a model without adapters, or, with the model as it was, where a merge or a save fails.
    """
    ExportPEFTConfig.model_validate({} if config is None else config)
    state, inner = _converted(model, "export"), unwrap(model)
    ours = [name for name in state.configs if name not in state.bare]
    ours.sort(key=lambda name: not _live(inner, name))  # what is merged goes first
    reports = {}
    if split_to is not None:
        _check_names(state)
        reports = {name: save_adapter(inner, Path(split_to) / name, name) for name in ours}
    elif any(_live(inner, name) for name in ours):
        merge(inner, [name for name in ours if _live(inner, name)], keep=False)
    for name in ours:
        detach(inner, name)
    forget(model)
    return reports


def _converted(model: nn.Module, doing: str) -> State:
    state = state_of(model)
    if state is None:
        raise VeneerError(f"{doing}: the model must be a PEFT model; call update_model(model, config) first")
    return state


def _check_names(state: State) -> None:
    for name in state.configs:
        if Path(name).name != name:
            raise VeneerError(f"the adapter {name!r} cannot be saved: its name is to be that of a directory")


def _live(model: nn.Module, name: str) -> bool:
    return any(name in host.veneer.route.live for _, host in hosts(model) if name in host.adapters)


def _marks(model: nn.Module, name: str) -> dict[str, Any]:
    """On how many layers an adapter lies, in which it is off, and in which it is not trained."""
    layers = [(layer, host) for layer, host in hosts(unwrap(model)) if name in host.adapters]
    off = [layer for layer, host in layers if name in host.veneer.off or name not in host.veneer.route.live]
    frozen = [layer for layer, host in layers if not any(p.requires_grad for p in host.adapters[name].parameters())]
    return {"layers": len(layers), "off": off, "frozen": frozen}


def _mark(model: nn.Module, name: str, marks: dict[str, Any]) -> None:
    for layer, host in hosts(model):
        if name in host.adapters:
            train((layer, host, name), layer not in marks["frozen"])
            if layer in marks["off"]:
                host.veneer.off.add(name)


def _read(file: Path) -> list[tuple[PEFTConfig, dict[str, Any]]]:
    data = read_json(file)
    try:
        modes = data["modelopt_state_dict"]
        return [(PEFTConfig.model_validate(mode["config"]), {"off": [], "frozen": [], **mode["metadata"]})
                for _, mode in modes]
    except (KeyError, TypeError, ValueError) as error:
        raise VeneerError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def _write_text(text: str, file: IO[bytes]) -> None:
    file.write(text.encode("utf-8"))

"""What a config trains beside its adapters: whole modules, rows of tokens, biases. Names are PEFT's
(peft/utils/other.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.io.dialects.hf_base import FileType
from veneer.io.dialects.hf_names import hits_saved
from veneer.io.records import BaseMap
from veneer.method import Method, VeneerError, nearest
from veneer.methods import Full, Rows
from veneer.notices import say
from veneer.peft.errors import NotInVeneerError
from veneer.peft.types import QA_HEADS, SEQ_CLS_HEADS
from veneer.weights import base_modules

Chosen = Iterator[tuple[str, Method]]  # full name of a parameter, what it gets


def saved(model: nn.Module, base: BaseMap, entries: Sequence[str]) -> Chosen:
    """Every parameter of the modules whose names end in an entry of modules_to_save. Warns of an entry that hits
    none, and of modules with buffers, which are not part of an adapter."""
    names = {id(module): name for name, module in base_modules(model) if name}
    hit: dict[str, None] = {}
    for entry in entries:
        mine = [names[id(module)] for name, module in model.named_modules(remove_duplicate=False)
                if name and id(module) in names and hits_saved(entry, name)]
        if not mine and entry not in (*SEQ_CLS_HEADS, *QA_HEADS):  # asked for without knowing which it has
            say(f"modules_to_save: no module's name ends in {entry!r}"
                f"{nearest(entry, {name.rpartition('.')[2] for name in names.values()})}")
        hit |= dict.fromkeys(mine)
    for name in hit:
        if name in base.buffered:
            say(f"modules_to_save: {name!r} has buffers; they stay with the base model, and the adapter's "
                "file holds its parameters alone")
        for path in base.by_path:
            if path.startswith(f"{name}."):
                yield path, Full()


def tokens(model: nn.Module, base: BaseMap, config: Any) -> Chosen:
    """The rows of `trainable_token_indices`. Raises `ValueError` where a name hits nothing that has rows, or is in
    modules_to_save too."""
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return
    by_name = wanted if isinstance(wanted, Mapping) else {_input_embedding(model): wanted}
    for entry, ids in by_name.items():
        if entry in (config.modules_to_save or ()):
            raise VeneerError(f"{entry!r} is in modules_to_save, so that all of it is trained, and in "
                              "trainable_token_indices; name it in one of them")
        mine = [name for name in base.modules if hits_saved(entry, name)]
        if not mine:
            raise VeneerError(f"Target modules {entry!r} of trainable_token_indices not found in the base model"
                              f"{nearest(entry, base.modules)}")
        for name in mine:
            site = base.by_path.get(f"{name}.weight")
            if site is None or len(site.layout.native) != 2:
                raise VeneerError(f"trainable_token_indices: {name!r} has no rows to train; name an embedding, or a "
                                  "head tied to it")
            yield f"{name}.weight", Rows(ids)


def _input_embedding(model: nn.Module) -> str:
    ask = getattr(model, "get_input_embeddings", None)
    table = ask() if callable(ask) else None
    return next((name for name, module in base_modules(model) if module is table), "embed_tokens")


def biases(base: BaseMap, config: Any, modules: Sequence[str], kind: FileType) -> Chosen:
    """The base's biases that `bias` means. Raises `NotInVeneerError` (a `ValueError` and a `NotImplementedError`) for
    another word."""
    word = getattr(config, "bias", "none")
    if word in ("none", None):
        return
    if word == "all":
        paths = [path for path in base.by_path if path == "bias" or path.endswith(".bias")]
    elif str(word).endswith("_only"):
        paths = [path for path in (f"{module}.bias" for module in modules) if path in base.by_path]
    else:
        known = ["none", "all", kind.bias_only]
        raise NotInVeneerError(f"Requested bias: {word!r} is not implemented{nearest(str(word), known) or '.'} "
                               f"Possible: {', '.join(known)}")
    for path in paths:
        yield path, Full()
